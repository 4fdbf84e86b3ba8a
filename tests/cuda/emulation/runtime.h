// What the driver (driver.cpp) and an emulated kernel (device.h) agree on. Both include this file as text, and a module
// tells at its load by a number made of this file's text whether it was compiled against the same one.

#pragma once

struct uint3 {
    unsigned x, y, z;
};

namespace emulation {

// A block under way. All its threads run on one thread of the operating system.
struct Block {
    uint3 index, grid, threads; // blockIdx, gridDim, blockDim
    void *dynamic;              // dynamic shared memory
    unsigned dynamic_size;
};

// A thread of a block; a register holds its address while it runs.
struct Thread {
    uint3 index;
    unsigned lane;
    Block *block;
};

enum Kind : unsigned {
    SYNC,
    SHUFFLE,
    VOTE,
    MMA_F16,
    MMA_BF16,
    MMA_TF32,
    LDMATRIX,
    LDMATRIX_TRANS,
};

// What a lane brings to an operation of the warp. The last lane that arrives carries the operation out for all.
struct Call {
    Kind kind;
    unsigned mask;
    unsigned line;
    unsigned lane; // SHUFFLE: the lane to read from
    const void *a; // SHUFFLE: an unsigned long; VOTE: an unsigned that is 0 or 1; MMA: a; LDMATRIX: the row
    const void *b; // MMA: b
    void *result;  // SHUFFLE: an unsigned long; VOTE: the unsigned of all lanes' bits; MMA: d; LDMATRIX: 4 unsigned
};

struct Runtime {
    // The barrier of the block; returns how many threads came with a predicate that is not 0.
    unsigned (*barrier)(Thread *, unsigned predicate, unsigned line);
    void (*sync)(Thread *, unsigned mask, unsigned line);
    unsigned long (*shuffle)(Thread *, unsigned mask, unsigned long value, unsigned lane, unsigned line);
    unsigned (*vote)(Thread *, unsigned mask, unsigned bit, unsigned line);
    void (*whole)(Thread *, Call *); // what takes a whole warp
    void (*copy)(Thread *, void *shared, const void *global, bool valid, unsigned line);
    void (*commit)(Thread *);
    void (*wait)(Thread *, unsigned groups);
    void (*trap)(Thread *, const char *message, unsigned line);
    // A kernel that is compiled to tell of races calls this before each access to memory.
    void (*access)(Thread *, const void *address, unsigned long size, bool write, const void *caller);
};

// What a module tells of one of its kernels, under the name KERNEL__kernel.
struct Kernel {
    void (*launch)(void **arguments); // runs one thread
    unsigned threads, blocks;         // __launch_bounds__, 0 where it does not say
    unsigned count;
    const unsigned *sizes;            // of the arguments, in bytes
};

// What a module tells of itself, under the name emulation__module.
struct Module {
    unsigned long version;            // of the interface
    const Runtime **runtime;          // to be set at the load
    char *shared, *shared_end;        // all the __shared__ variables
    const char *architecture;         // "90a", for example
};

// What cuTensorMapEncodeTiled makes of its arguments: the 128 bytes of a CUtensorMap.
struct alignas(64) TensorMap {
    unsigned long magic;
    unsigned long address;
    unsigned long dimensions[5]; // in elements, the innermost first
    unsigned long strides[4];    // in bytes, from the second dimension on
    unsigned short box[5];
    unsigned char element_strides[5];
    unsigned char type, rank, interleave, swizzle, promotion, fill;
    static constexpr unsigned long MAGIC = 0x70616d726f736e65ul;
};

static_assert(sizeof(TensorMap) == 128, "a map has 128 bytes");

} // namespace emulation
