// Instructions that only Hopper (sm_90a) has: barriers that count bytes, copies of boxes of a matrix by the tensor
// memory accelerator, products by warpgroups, and what belongs to them.
//
// Places in shared memory are the 32-bit addresses of `shared_place`. A warpgroup is four warps, the first of which has
// a number that is a multiple of 4; what says so is called by all its 128 threads.
//
// What is assumed of a GPU here follows the manual of PTX 8.0, and stands where it matters, as an assumption.

#pragma once

#include "types.cuh"

// What the host's cuTensorMapEncodeTiled makes: how the tensor memory accelerator sees a matrix. It is an argument of a
// kernel, `const __grid_constant__ CUtensorMap name`, and is given on by reference only: it must stay where it is.
struct alignas(64) CUtensorMap {
    u64 words[16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ u32 shared_place(const void *pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

// Barriers in shared memory, 8 bytes each. A phase of one is over when as many threads have arrived as it was told of
// at the beginning and no more bytes are expected. Phases have parities 0, 1, 0, …
//
// Assumption: who waits for a parity goes on if the present phase has the other one. So to wait for parity 1 in the
// beginning is to wait for nothing, as for the phase before the first; and nobody may be two phases behind.
//
// Assumption: arrivals release what the thread has done before, products that it has waited for included, and a wait
// acquires it, for copies that the thread asks for afterwards as for what it reads itself.

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Follows the beginning of barriers in the thread that has begun them, before a __syncthreads(): from then on copies
// know them, too. Some use one of these two fences for it and some the other; once for each block, both cost nothing.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Has the present phase wait for so many bytes of copies, and arrives.
__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Whether the phase of a parity is over, which is waited for a little.
__device__ __forceinline__ bool mbarrier_try_wait(u32 barrier, u32 parity) {
    u32 over;
    asm volatile("{\n"
                 ".reg .pred over;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                 "selp.b32 %0, 1, 0, over;\n"
                 "}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return over != 0;
}

// Where ordinary instructions have read or written shared memory that copies write or products read later: by each
// thread that has, before the barrier between them. Copies and products among themselves need none.
__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Waits for `threads` threads, a multiple of 32, at the block's barrier with a number from 1 to 15; 0 is that of
// __syncthreads().
__device__ __forceinline__ void named_barrier(u32 number, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Brings what is known of a matrix nearer, to be used soon. Assumption, for this as for copies: the generic address of
// an argument is one that maps are read from.
__device__ __forceinline__ void prefetch_map(const CUtensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box of a matrix that begins at a column and a row, both of which may lie outside, to shared memory, a
// multiple of 128 bytes. One thread asks for it. Outside of the matrix there are zeros.
//
// Assumptions: the barrier is told of the bytes of the whole box, those outside too, when all are there. With a swizzle
// of 128 bytes a piece of 16 bytes goes to its address with bits 4 to 6 changed by bits 7 to 9.
__device__ __forceinline__ void copy_box(u32 to, const CUtensorMap &map, i32 column, i32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
                 "[%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}

// The same for the same place of all blocks of the cluster that have a bit in the mask, each of whose barriers is told.
__device__ __forceinline__ void
copy_box_to_blocks(u32 to, const CUtensorMap &map, i32 column, i32 row, u32 barrier, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
                 : "memory");
}

// Clusters: the number of this block in its own, a barrier of all its threads, and arrivals at the barrier of another
// of its blocks at the same place.

__device__ __forceinline__ u32 block_of_cluster() {
    u32 number;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(number));
    return number;
}

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\n"
                 "barrier.cluster.wait.aligned;" ::
                     : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_at(u32 barrier, u32 block) {
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(barrier),
                 "r"(block)
                 : "memory");
}

// Registers of each thread of a warpgroup, which gives some of its own away or gets some of those given away; it waits
// for them. A multiple of 8 from 24 to 240. The compiler heeds it where __launch_bounds__ says how many blocks there
// are, and each role of a warpgroup is one branch.

template <int REGISTERS> __device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Products of a warpgroup, in the background: d (64 × N) = a (64 × 16) · b (16 × N), or added to d with ADD, of f16 or
// bf16 in shared memory with f32 sums. Both are said where they are by a descriptor.
//
// Thread t of the warpgroup has of d, with w = t / 32, g = t % 32 / 4 and p = t % 4,
//     d[4j], d[4j + 1]       row 16w + g, columns 8j + 2p and 8j + 2p + 1
//     d[4j + 2], d[4j + 3]   the same of row 16w + g + 8
//
// The order of calls: `wgmma_fence` after sums were used by anything else and before the first product; products;
// `wgmma_commit`, which makes a group of them; `wgmma_wait`. Sums, and what is multiplied, are left alone until their
// group was waited for. `hold` keeps the compiler from moving sums between products and the wait.
//
// Assumptions: products that are added to the same sums are done one after the other without a fence. A warp that has
// waited knows of its own 16 rows only that what they are made of was read; other warps may still read it.

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N groups, the last ones, are still under way.
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

#define WGMMA_NAMES_64                                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_128                                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                                 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                 \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                     \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_PAIR(how, i) how(d[i]), how(d[i + 1])
#define WGMMA_EIGHT(how, i)                                                                                            \
    WGMMA_PAIR(how, i), WGMMA_PAIR(how, i + 2), WGMMA_PAIR(how, i + 4), WGMMA_PAIR(how, i + 6)
#define WGMMA_32(how, i)                                                                                               \
    WGMMA_EIGHT(how, i), WGMMA_EIGHT(how, i + 8), WGMMA_EIGHT(how, i + 16), WGMMA_EIGHT(how, i + 24)
#define WGMMA_SUMS_64(how) WGMMA_32(how, 0), WGMMA_32(how, 32)
#define WGMMA_SUMS_128(how) WGMMA_SUMS_64(how), WGMMA_32(how, 64), WGMMA_32(how, 96)

// What is not added to is not read: a copy of what it was before would stay in registers for it.
#define WGMMA_READ(sum) "+f"(sum)
#define WGMMA_WRITE(sum) "=f"(sum)

// The numbers at the end are those of the operands behind the sums: a, b, whether to add, whether rows of a, and
// columns of b, are stored next to each other, and not inner places.
#define WGMMA(WIDTH, TYPE, SUMS, HOW, N_A, N_B, N_ADD, N_ACROSS_A, N_ACROSS_B)                                         \
    asm volatile("{\n"                                                                                                 \
                 ".reg .pred add;\n"                                                                                   \
                 "setp.ne.b32 add, %" #N_ADD ", 0;\n"                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." #TYPE "." #TYPE " "                             \
                 "{" WGMMA_NAMES_##SUMS "}, "                                                                          \
                 "%" #N_A ", %" #N_B ", add, 1, 1, %" #N_ACROSS_A ", %" #N_ACROSS_B ";\n"                              \
                 "}"                                                                                                   \
                 : WGMMA_SUMS_##SUMS(HOW)                                                                              \
                 : "l"(a), "l"(b), "n"((int)ADD), "n"((int)A_ACROSS), "n"((int)B_ACROSS))

#define WGMMA_FUNCTION(NAME, WIDTH, TYPE, SUMS, N_A, N_B, N_ADD, N_ACROSS_A, N_ACROSS_B)                               \
    template <bool ADD, bool A_ACROSS, bool B_ACROSS>                                                                  \
    __device__ __forceinline__ void NAME(float (&d)[SUMS], u64 a, u64 b) {                                             \
        if constexpr (ADD) {                                                                                           \
            WGMMA(WIDTH, TYPE, SUMS, WGMMA_READ, N_A, N_B, N_ADD, N_ACROSS_A, N_ACROSS_B);                             \
        } else {                                                                                                       \
            WGMMA(WIDTH, TYPE, SUMS, WGMMA_WRITE, N_A, N_B, N_ADD, N_ACROSS_A, N_ACROSS_B);                            \
        }                                                                                                              \
    }

WGMMA_FUNCTION(wgmma_f16, 128, f16, 64, 64, 65, 66, 67, 68)
WGMMA_FUNCTION(wgmma_bf16, 128, bf16, 64, 64, 65, 66, 67, 68)
WGMMA_FUNCTION(wgmma_f16, 256, f16, 128, 128, 129, 130, 131, 132)
WGMMA_FUNCTION(wgmma_bf16, 256, bf16, 128, 128, 129, 130, 131, 132)

#endif
