// A tile of a matrix product by Hopper's warpgroups, 128 × 256 or 128 × 128, of 16-bit values with f32 sums.
//
// A block is three warpgroups and has a multiprocessor for itself. One thread of the last warpgroup asks the tensor
// memory accelerator for stages, 64 inner places of the lines of both sides; the other two warpgroups multiply, each
// its half of the tile. The ring of stages goes on from tile to tile, so that copies for the next tile are under way
// while sums of this one are written. Each stage has two barriers: `full` is over when its bytes are there, `empty`
// when all warps that multiply have read it.
//
// Why 128 × 256: a stage is 48 KiB for 1,024 cycles of the tensor cores, 48 bytes a cycle that the cache has to bring.
// 128 × 128 wants 64; more than 128 × 256 sums do not fit into registers. Four stages fit into shared memory, so that
// copies are up to three ahead of the products, 3,072 cycles. Halves of 64 × 256 read 80 bytes a cycle from shared
// memory, squares of 128 × 128 96, of 128 that there are for reading and for copies. Squares are for what needs rows
// and columns alike.
//
// Matrices are stored by lines, a row for each line with its inner places next to each other, or across, a row for each
// inner place with its lines next to each other. Their rows are padded to a multiple of 8 values, 16 bytes. The host
// makes tensor maps of 16-bit values in two dimensions with a swizzle of 128 bytes, whose extents are exactly what is
// to be multiplied, without padding: what is outside counts as zero. Boxes are
//     by lines   64 inner places × as many lines as a tile has of that side: 128 rows, 256 or 128 columns
//     across     64 lines × 64 inner places
//
// In shared memory rows of a box are 128 bytes, whose pieces of 16 bytes stand at piece ^ row % 8: copies write them
// so, and products read them so, both by the bits of the address. So stages are at multiples of 1,024 bytes.

#pragma once

#include "hopper.cuh"
#include "tensor_tile.cuh"

// Threads of a block, of one of its warpgroups, and how many warpgroups multiply.
constexpr int HOPPER_THREADS = 384;
constexpr int GROUP_THREADS = 128;
constexpr int HOPPER_GROUPS = 2;
// Rows of a block's tile, and inner places of a stage.
constexpr u32 HOPPER_ROWS = 128;
constexpr u32 HOPPER_STEP = 64;

// Which tile of a matrix of down × across tiles has a number. Blocks near each other in time have tiles near each
// other: bands of 16 rows of tiles, column after column, so that those under way together are about as high as wide.
__device__ __forceinline__ uint2 place_of_hopper_tile(u32 number, u32 down, u32 across) {
    u32 band = number / (16 * across);
    u32 height = min(16u, down - 16 * band);
    u32 in_band = number - 16 * band * across;
    return make_uint2(16 * band + in_band % height, in_band / height);
}

// What one of the two warpgroups has of a block's tile: a tile of its own, like the others of shared/tile.cuh, for its
// 128 threads. Rows and columns are counted from its own first ones. 64 rows each are below each other, squares beside
// each other.
template <int HEIGHT_, int WIDTH_> struct GroupTile {
    static constexpr int HEIGHT = HEIGHT_;
    static constexpr int WIDTH = WIDTH_;
    static_assert((HEIGHT == 64 && (WIDTH == 128 || WIDTH == 256)) || (HEIGHT == 128 && WIDTH == 128), "half a tile");
    static constexpr bool BESIDE = HEIGHT == 128;
    // Of the block's tile.
    static constexpr u32 BLOCK_ROWS = HOPPER_ROWS;
    static constexpr u32 BLOCK_COLUMNS = BESIDE ? 2 * WIDTH : WIDTH;

    static constexpr int THREADS = GROUP_THREADS;
    static constexpr int LANES_ACROSS = 4;
    static constexpr int WARPS_ACROSS = 1;
    static constexpr int WARPS_DOWN = 4;
    static constexpr int VECTOR = 2;
    // Products of 64 rows.
    static constexpr int DOWN = HEIGHT / 64;
    static constexpr int ROWS = 2 * DOWN;
    static constexpr int COLUMNS = WIDTH / 4;

    float values[DOWN][WIDTH / 2];

    __device__ __forceinline__ float &at(int u, int v) {
        return values[u / 2][v / 2 * 4 + u % 2 * 2 + v % 2];
    }

    // Which group this thread is of, and its number there.

    __device__ __forceinline__ static u32 group() {
        return threadIdx.x / GROUP_THREADS;
    }

    __device__ __forceinline__ static u32 thread() {
        return threadIdx.x % GROUP_THREADS;
    }

    // Where the group's tile begins in the block's.

    __device__ __forceinline__ static u32 first_row() {
        return BESIDE ? 0 : group() * HEIGHT;
    }

    __device__ __forceinline__ static u32 first_column() {
        return BESIDE ? group() * WIDTH : 0;
    }

    __device__ __forceinline__ static u32 warp_across() {
        return 0;
    }

    __device__ __forceinline__ static u32 warp_down() {
        return thread() / 32;
    }

    __device__ __forceinline__ static u32 row(int u) {
        return warp_down() * 16 + threadIdx.x % 32 / 4 + down(u);
    }

    __device__ __forceinline__ static u32 column(int v) {
        return threadIdx.x % 4 * 2 + right(v);
    }

    // How far rows and columns are from a thread's first ones.

    __device__ __forceinline__ static constexpr u32 down(int u) {
        return u / 2 * 64 + u % 2 * 8;
    }

    __device__ __forceinline__ static constexpr u32 right(int v) {
        return v / 2 * 8 + v % 2;
    }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    // A barrier of the group. __syncthreads() would wait for the warpgroup that copies.
    __device__ __forceinline__ static void sync() {
        named_barrier(1 + group(), GROUP_THREADS);
    }
#endif
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <bool ADD, bool A_ACROSS, bool B_ACROSS, int N>
__device__ __forceinline__ void multiply_group(F16, float (&d)[N], u64 a, u64 b) {
    wgmma_f16<ADD, A_ACROSS, B_ACROSS>(d, a, b);
}

template <bool ADD, bool A_ACROSS, bool B_ACROSS, int N>
__device__ __forceinline__ void multiply_group(Bf16, float (&d)[N], u64 a, u64 b) {
    wgmma_bf16<ADD, A_ACROSS, B_ACROSS>(d, a, b);
}

// Both matrices of a tile in a ring of stages. Each thread counts for itself where in it it is: the one that asks for
// copies, and those that multiply. Both go through the same tiles and the same stages of each.
template <typename Format, bool LEFT_BY_LINES, bool RIGHT_BY_LINES, typename Tile, int STAGES> struct HopperRing {
    // Bytes of a box across, and of what a row of any box is.
    static constexpr u32 BOX = 8192;
    static constexpr u32 ROW = 128;
    static constexpr u32 LEFT_BYTES = Tile::BLOCK_ROWS * ROW;
    static constexpr u32 RIGHT_BYTES = Tile::BLOCK_COLUMNS * ROW;
    static constexpr u32 STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
    // Dynamic shared memory, which may begin anywhere: stages, barriers, and from `rest` on what else was launched
    // with.
    static constexpr u32 BYTES = 1024 + STAGES * STAGE_BYTES + 16 * STAGES;
    // Warps that read a stage, each of which says when it has.
    static constexpr u32 READERS = HOPPER_GROUPS * GROUP_THREADS / 32;

    u32 stages;
    u32 slot;
    u32 parity;

    __device__ __forceinline__ u32 full(u32 of) const {
        return stages + STAGES * STAGE_BYTES + 8 * of;
    }

    __device__ __forceinline__ u32 empty(u32 of) const {
        return full(STAGES + of);
    }

    // What follows the barriers in the dynamic shared memory that is given, at a multiple of 16 bytes.
    __device__ __forceinline__ char *rest(void *memory) const {
        return (char *)memory + (full(2 * STAGES) - shared_place(memory));
    }

    // Whether this thread is of the warpgroup that copies, and whether it is the one that does so.

    __device__ __forceinline__ static bool is_of_copies() {
        return threadIdx.x >= HOPPER_GROUPS * GROUP_THREADS;
    }

    __device__ __forceinline__ static bool copies() {
        return threadIdx.x == HOPPER_GROUPS * GROUP_THREADS;
    }

    // By all threads, before anything else.
    __device__ __forceinline__ void begin(void *memory, const CUtensorMap &left, const CUtensorMap &right) {
        stages = (shared_place(memory) + 1023) / 1024 * 1024;
        slot = 0;
        parity = 0;
        if (threadIdx.x == 0) {
            prefetch_map(left);
            prefetch_map(right);
            for (u32 i = 0; i < STAGES; i++) {
                mbarrier_init(full(i), 1);
                mbarrier_init(empty(i), READERS);
            }
            mbarrier_init_fence();
        }
        __syncthreads();
    }

    __device__ __forceinline__ void advance() {
        slot++;
        if (slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }

    __device__ __forceinline__ static void wait(u32 barrier, u32 parity) {
        while (!mbarrier_try_wait(barrier, parity)) {
        }
    }

    // Asks for the stages of the inner places from `first`, a multiple of STEP, to `end` of the lines from a row and a
    // column on. By one thread.
    __device__ __forceinline__ void
    copy(const CUtensorMap &left, const CUtensorMap &right, u32 row, u32 column, u32 first, u32 end) {
        for (u32 k = first; k < end; k += HOPPER_STEP) {
            // For the first stages this is the phase before the first, which is over.
            wait(empty(slot), parity ^ 1);
            mbarrier_arrive_expect(full(slot), STAGE_BYTES);
            u32 stage = stages + slot * STAGE_BYTES;
            copy_lines<LEFT_BY_LINES, Tile::BLOCK_ROWS>(stage, left, row, k);
            copy_lines<RIGHT_BY_LINES, Tile::BLOCK_COLUMNS>(stage + LEFT_BYTES, right, column, k);
            advance();
        }
    }

    template <bool BY_LINES, u32 LINES>
    __device__ __forceinline__ void copy_lines(u32 to, const CUtensorMap &map, u32 line, u32 k) const {
        if constexpr (BY_LINES) {
            copy_box(to, map, (i32)k, (i32)line, full(slot));
        } else {
#pragma unroll
            for (u32 i = 0; i < LINES / 64; i++) {
                copy_box(to + i * BOX, map, (i32)(line + 64 * i), (i32)k, full(slot));
            }
        }
    }

    // Where the matrix is that begins at a place in shared memory: blocks of 8 rows of 128 bytes with a swizzle of 128
    // bytes. By lines the rows are lines, and each block of 8 lines is 1,024 bytes behind the one before. Across they
    // are inner places, 8 of which are a block likewise, and each 64 lines are a box behind the ones before. This is
    // the low half, in which places are counted by 16 bytes; the high half is the same for all.
    //
    // Assumptions: across, bits 16 to 29 say how far 64 lines are apart, and bits 32 to 45 how far 8 inner places are.
    // By lines, the former are not looked at. A matrix may begin within a row of the first block, 16 inner places
    // further, without a word of it in bits 49 to 51, as the swizzle goes by the address.
    template <bool BY_LINES> __device__ __forceinline__ static u32 descriptor(u32 place) {
        return (BY_LINES ? 1 : BOX / 16) << 16 | place / 16;
    }

    __device__ __forceinline__ static u64 whole_descriptor(u32 low) {
        constexpr u32 HIGH = 1u << 30 | 1024 / 16;
        return (u64)HIGH << 32 | low;
    }

    // From 16 inner places of a stage to the next ones, as descriptors count.
    template <bool BY_LINES> __device__ __forceinline__ static u32 places_apart() {
        return BY_LINES ? 16 * 2 / 16 : 16 * ROW / 16;
    }

    // The products of as many stages, in a tile whose sums are free for use afterwards. By whole warpgroups.
    __device__ __forceinline__ void multiply(Tile &tile, u32 steps) {
        if (steps == 0) {
#pragma unroll
            for (int u = 0; u < Tile::ROWS; u++) {
#pragma unroll
                for (int v = 0; v < Tile::COLUMNS; v++) {
                    tile.at(u, v) = 0.0f;
                }
            }
            return;
        }
        // What all threads of a warp have alike. From a shuffle the compiler knows that they do, and computes
        // descriptors once for the warp, which products want so.
        u32 group = __shfl_sync(WHOLE_WARP, Tile::group(), 0);
        // Both by lines and across 64 lines are a box.
        u32 left_place = stages + (Tile::BESIDE ? 0 : group * BOX);
        u32 right_place = stages + LEFT_BYTES + (Tile::BESIDE ? group * 2 * BOX : 0);
        u32 left = descriptor<LEFT_BY_LINES>(left_place);
        u32 right = descriptor<RIGHT_BY_LINES>(right_place);
        multiply_stage<false>(tile, left, right);
        u32 before = slot;
        advance();
        for (u32 step = 1; step < steps; step++) {
            multiply_stage<true>(tile, left, right);
            // This stage goes on being multiplied while the next one is waited for. The one before has been read.
            wgmma_wait<1>();
            release(before);
            before = slot;
            advance();
        }
        wgmma_wait<0>();
        hold_sums(tile);
        release(before);
    }

    // Waits for a stage and begins its products. The first ones of a tile are not added to anything.
    template <bool ADD> __device__ __forceinline__ void multiply_stage(Tile &tile, u32 left, u32 right) const {
        wait(full(slot), parity);
        // As above of the group: from a shuffle.
        u32 stage = __shfl_sync(WHOLE_WARP, slot, 0) * (STAGE_BYTES / 16);
        if (ADD) {
            hold_sums(tile);
        }
        wgmma_fence();
#pragma unroll
        for (u32 places = 0; places < HOPPER_STEP / 16; places++) {
            u64 b = whole_descriptor(right + stage + places * places_apart<RIGHT_BY_LINES>());
#pragma unroll
            for (int i = 0; i < Tile::DOWN; i++) {
                u64 a = whole_descriptor(left + stage + places * places_apart<LEFT_BY_LINES>() + i * (BOX / 16));
                if (ADD || places > 0) {
                    multiply_group<true, !LEFT_BY_LINES, !RIGHT_BY_LINES>(Format(), tile.values[i], a, b);
                } else {
                    multiply_group<false, !LEFT_BY_LINES, !RIGHT_BY_LINES>(Format(), tile.values[i], a, b);
                }
            }
        }
        wgmma_commit();
        hold_sums(tile);
    }

    __device__ __forceinline__ static void hold_sums(Tile &tile) {
#pragma unroll
        for (int i = 0; i < Tile::DOWN; i++) {
            hold(tile.values[i]);
        }
    }

    // Says that this warp has read a stage: each for itself, as it knows nothing of the others.
    __device__ __forceinline__ void release(u32 of) const {
        if (threadIdx.x % 32 == 0) {
            mbarrier_arrive(empty(of));
        }
    }
};

#endif
