// The part of CUDA C++ that a kernel sees when g++ compiles it. The program's text follows this file's.

#pragma once

#include "runtime.h"

typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

extern "C" {
void *memcpy(void *, const void *, size_t);
void *memset(void *, int, size_t);
int printf(const char *, ...);
float expf(float), exp2f(float), exp10f(float), expm1f(float), logf(float), log2f(float), log10f(float), log1pf(float);
float sinf(float), cosf(float), tanf(float), asinf(float), acosf(float), atanf(float), atan2f(float, float);
float sinhf(float), coshf(float), tanhf(float), erff(float), erfcf(float), powf(float, float), cbrtf(float);
float fmodf(float, float), remainderf(float, float), ldexpf(float, int), frexpf(float, int *), hypotf(float, float);
double exp(double), exp2(double), expm1(double), log(double), log2(double), log1p(double), pow(double, double);
double sin(double), cos(double), tanh(double), erf(double);
}

// Memory and functions. A module is loaded once for every thread of the operating system that runs blocks, so that a
// plain static variable is shared by one block at a time. Shared memory is all that a module has in .bss.
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __forceinline__ __attribute__((always_inline)) inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

namespace emulation {

#if defined(__x86_64__)
register Thread *thread asm("r15");
#elif defined(__aarch64__)
register Thread *thread asm("x28");
#else
#error "the emulation knows x86-64 and AArch64 only"
#endif

// Anything but zero, so that it does not lie where the shared memory does.
static const Runtime *runtime = (const Runtime *)1;

extern "C" char __bss_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

template <typename T> struct Dynamic {
    operator T *() const { return (T *)thread->block->dynamic; }
};

template <unsigned... I> struct Indices {};

template <typename... A, unsigned... I>
static inline void call(void (*kernel)(A...), void **arguments, Indices<I...>) {
    kernel(*(A *)arguments[I]...);
}

template <typename... A> static inline void call(void (*kernel)(A...), void **arguments) {
    call(kernel, arguments, Indices<__integer_pack(sizeof...(A))...>());
}

template <typename... A> struct Sizes {
    static constexpr unsigned COUNT = sizeof...(A);
    static constexpr unsigned SIZES[sizeof...(A) + 1] = {(unsigned)sizeof(A)..., 0};
};

template <typename... A> Sizes<A...> sizes_of(void (*)(A...));

struct Bounds {
    unsigned threads = 0, blocks = 0, clusters = 0;
};

} // namespace emulation

#define EMULATION_EXPORT extern "C" __attribute__((visibility("default"), used))

// Follows the declaration of a kernel, with what its __launch_bounds__ say.
#define EMULATION_KERNEL(name, ...)                                                                                    \
    static void name##__launch(void **arguments) { emulation::call(name, arguments); }                                 \
    EMULATION_EXPORT const emulation::Kernel name##__kernel = {                                                        \
        name##__launch, emulation::Bounds{__VA_ARGS__}.threads, emulation::Bounds{__VA_ARGS__}.blocks,                 \
        decltype(emulation::sizes_of(name))::COUNT, decltype(emulation::sizes_of(name))::SIZES                         \
    };

#define EMULATION_MODULE(version, architecture)                                                                        \
    EMULATION_EXPORT const emulation::Module emulation__module = {                                                     \
        version, &emulation::runtime, emulation::__bss_start, emulation::_end, architecture                            \
    };

#define threadIdx (emulation::thread->index)
#define blockIdx (emulation::thread->block->index)
#define blockDim (emulation::thread->block->threads)
#define gridDim (emulation::thread->block->grid)
static constexpr int warpSize = 32;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Vectors
#define EMULATION_VECTORS(type, name, alignment2, alignment4)                                                          \
    struct name##1 {                                                                                                   \
        type x;                                                                                                        \
    };                                                                                                                 \
    struct alignas(alignment2) name##2 {                                                                               \
        type x, y;                                                                                                     \
    };                                                                                                                 \
    struct alignas(alignment4) name##4 {                                                                               \
        type x, y, z, w;                                                                                               \
    };                                                                                                                 \
    static inline name##1 make_##name##1(type x) { return {x}; }                                                       \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                            \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                 \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define EMULATION_VECTORS3(type, name, alignment2, alignment4)                                                         \
    struct name##3 {                                                                                                   \
        type x, y, z;                                                                                                  \
    };                                                                                                                 \
    EMULATION_VECTORS(type, name, alignment2, alignment4)

EMULATION_VECTORS(unsigned, uint, 8, 16)
EMULATION_VECTORS3(int, int, 8, 16)
EMULATION_VECTORS3(float, float, 8, 16)
EMULATION_VECTORS3(double, double, 16, 16)
EMULATION_VECTORS3(signed char, char, 2, 4)
EMULATION_VECTORS3(unsigned char, uchar, 2, 4)
EMULATION_VECTORS3(short, short, 4, 8)
EMULATION_VECTORS3(unsigned short, ushort, 4, 8)
EMULATION_VECTORS3(long long, longlong, 16, 16)
EMULATION_VECTORS3(unsigned long long, ulonglong, 16, 16)

// Bits
namespace emulation {
template <typename To, typename From> static inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    __builtin_memcpy(&result, &value, sizeof(result));
    return result;
}
} // namespace emulation

static inline unsigned __float_as_uint(float x) { return emulation::bits<unsigned>(x); }
static inline int __float_as_int(float x) { return emulation::bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return emulation::bits<float>(x); }
static inline float __int_as_float(int x) { return emulation::bits<float>(x); }
static inline long long __double_as_longlong(double x) { return emulation::bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emulation::bits<double>(x); }

static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
static inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned select = selector >> 4 * i & 15;
        unsigned byte = (unsigned)(both >> 8 * (select & 7)) & 255;
        if (select & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}

// Numbers
#define EMULATION_MINMAX(type, a, b)                                                                                   \
    static inline type min(a x, b y) { return (type)x < (type)y ? (type)x : (type)y; }                                 \
    static inline type max(a x, b y) { return (type)x > (type)y ? (type)x : (type)y; }
EMULATION_MINMAX(int, int, int)
EMULATION_MINMAX(unsigned, unsigned, unsigned)
EMULATION_MINMAX(unsigned, int, unsigned)
EMULATION_MINMAX(unsigned, unsigned, int)
EMULATION_MINMAX(long, long, long)
EMULATION_MINMAX(unsigned long, unsigned long, unsigned long)
EMULATION_MINMAX(unsigned long, long, unsigned long)
EMULATION_MINMAX(unsigned long, unsigned long, long)
EMULATION_MINMAX(long long, long long, long long)
EMULATION_MINMAX(unsigned long long, unsigned long long, unsigned long long)
EMULATION_MINMAX(unsigned long long, long long, unsigned long long)
EMULATION_MINMAX(unsigned long long, unsigned long long, long long)

static inline float fminf(float x, float y) { return y != y || x < y ? x : y; }
static inline float fmaxf(float x, float y) { return y != y || x > y ? x : y; }
static inline double fmin(double x, double y) { return y != y || x < y ? x : y; }
static inline double fmax(double x, double y) { return y != y || x > y ? x : y; }
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }
static inline double min(double x, double y) { return fmin(x, y); }
static inline double max(double x, double y) { return fmax(x, y); }
static inline double min(float x, double y) { return fmin(x, y); }
static inline double max(float x, double y) { return fmax(x, y); }
static inline double min(double x, float y) { return fmin(x, y); }
static inline double max(double x, float y) { return fmax(x, y); }

static inline int abs(int x) { return x < 0 ? -x : x; }
static inline long abs(long x) { return x < 0 ? -x : x; }
static inline long long abs(long long x) { return x < 0 ? -x : x; }
static inline float abs(float x) { return __builtin_fabsf(x); }
static inline double abs(double x) { return __builtin_fabs(x); }
static inline float fabsf(float x) { return __builtin_fabsf(x); }
static inline double fabs(double x) { return __builtin_fabs(x); }
static inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
static inline float sqrtf(float x) { return __builtin_sqrtf(x); }
static inline double sqrt(double x) { return __builtin_sqrt(x); }
static inline float rsqrtf(float x) { return (float)(1.0 / __builtin_sqrt((double)x)); }
static inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
static inline float floorf(float x) { return __builtin_floorf(x); }
static inline float ceilf(float x) { return __builtin_ceilf(x); }
static inline float truncf(float x) { return __builtin_truncf(x); }
static inline float rintf(float x) { return __builtin_rintf(x); }
static inline float nearbyintf(float x) { return __builtin_rintf(x); }
static inline float roundf(float x) { return __builtin_roundf(x); }
static inline double floor(double x) { return __builtin_floor(x); }
static inline double ceil(double x) { return __builtin_ceil(x); }
static inline float copysignf(float x, float y) { return __builtin_copysignf(x, y); }
static inline double copysign(double x, double y) { return __builtin_copysign(x, y); }
static inline bool isnan(float x) { return x != x; }
static inline bool isnan(double x) { return x != x; }
static inline bool isinf(float x) { return __builtin_isinf(x) != 0; }
static inline bool isinf(double x) { return __builtin_isinf(x) != 0; }
static inline bool isfinite(float x) { return __builtin_isfinite(x) != 0; }
static inline bool isfinite(double x) { return __builtin_isfinite(x) != 0; }
static inline bool signbit(float x) { return __builtin_signbit(x) != 0; }

static inline float __expf(float x) { return expf(x); }
static inline float __exp10f(float x) { return exp10f(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float __log10f(float x) { return log10f(x); }
static inline float __sinf(float x) { return sinf(x); }
static inline float __cosf(float x) { return cosf(x); }
static inline float __powf(float x, float y) { return powf(x, y); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
static inline float __frsqrt_rn(float x) { return rsqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// Conversions that saturate, as the device's do. (A plain cast of a number out of range is undefined here as there.)
static inline int __float2int_rz(float x) {
    return x != x ? 0 : x >= 2147483648.0f ? 0x7fffffff : x < -2147483648.0f ? -0x7fffffff - 1 : (int)x;
}
static inline unsigned __float2uint_rz(float x) {
    return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? 0xffffffffu : (unsigned)x;
}
static inline int __float2int_rn(float x) { return __float2int_rz(rintf(x)); }
static inline int __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
static inline int __float2int_ru(float x) { return __float2int_rz(ceilf(x)); }
static inline unsigned __float2uint_rn(float x) { return __float2uint_rz(rintf(x)); }
static inline unsigned __float2uint_rd(float x) { return __float2uint_rz(floorf(x)); }
static inline unsigned __float2uint_ru(float x) { return __float2uint_rz(ceilf(x)); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }

// Loads and stores with a hint, which is ignored.
template <typename T> static inline T __ldg(const T *p) { return *p; }
template <typename T> static inline T __ldcg(const T *p) { return *p; }
template <typename T> static inline T __ldca(const T *p) { return *p; }
template <typename T> static inline T __ldcs(const T *p) { return *p; }
template <typename T> static inline T __ldlu(const T *p) { return *p; }
template <typename T> static inline void __stwb(T *p, T value) { *p = value; }
template <typename T> static inline void __stcg(T *p, T value) { *p = value; }
template <typename T> static inline void __stcs(T *p, T value) { *p = value; }
template <typename T> static inline void __stwt(T *p, T value) { *p = value; }

// `__shared__ alignas(16) float x[4]` is right in CUDA; with a plain `static` in front of it g++ wants an attribute.
namespace emulation {
template <typename T> constexpr size_t alignment() { return alignof(T); }
template <unsigned N> constexpr size_t alignment() { return N; }
} // namespace emulation
#define alignas(...) __attribute__((aligned(emulation::alignment<__VA_ARGS__>())))

// The block. The last argument of these functions is the line they are called from, for messages.
#define EMULATION_LINE unsigned line = __builtin_LINE()
static inline void __syncthreads(EMULATION_LINE) { emulation::runtime->barrier(emulation::thread, 0, line); }
static inline int __syncthreads_count(int predicate, EMULATION_LINE) {
    return (int)emulation::runtime->barrier(emulation::thread, predicate != 0, line);
}
static inline int __syncthreads_or(int predicate, EMULATION_LINE) {
    return emulation::runtime->barrier(emulation::thread, predicate != 0, line) != 0;
}
static inline int __syncthreads_and(int predicate, EMULATION_LINE) {
    return emulation::runtime->barrier(emulation::thread, predicate == 0, line) == 0;
}
static inline void __threadfence() { asm volatile("" ::: "memory"); }
static inline void __threadfence_block() { asm volatile("" ::: "memory"); }
static inline void __threadfence_system() { asm volatile("" ::: "memory"); }
static inline void __nanosleep(unsigned) {}
static inline void __trap(EMULATION_LINE) { emulation::runtime->trap(emulation::thread, "__trap()", line); }
#define assert(condition) ((condition) ? (void)0 : emulation::runtime->trap(emulation::thread, #condition, __LINE__))

// The warp
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_LINE) {
    emulation::runtime->sync(emulation::thread, mask, line);
}

namespace emulation {

// A lane that is to read from none reads its own value.
template <typename T> static inline T shuffle(unsigned mask, T value, unsigned lane, unsigned line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle takes 4 or 8 bytes");
    unsigned long word = 0;
    __builtin_memcpy(&word, &value, sizeof(value));
    word = runtime->shuffle(thread, mask, word, lane, line);
    __builtin_memcpy(&value, &word, sizeof(value));
    return value;
}

} // namespace emulation

#define EMULATION_SHUFFLES(type)                                                                                       \
    static inline type __shfl_sync(unsigned mask, type value, int source, int width = 32, EMULATION_LINE) {            \
        unsigned lane = emulation::thread->lane;                                                                       \
        return emulation::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), line);                  \
    }                                                                                                                  \
    static inline type __shfl_xor_sync(unsigned mask, type value, int bits, int width = 32, EMULATION_LINE) {          \
        unsigned lane = emulation::thread->lane, source = lane ^ bits;                                                 \
        bool above = source > (lane | (width - 1));                                                                    \
        return emulation::shuffle(mask, value, above ? lane : source, line);                                           \
    }                                                                                                                  \
    static inline type __shfl_down_sync(unsigned mask, type value, unsigned delta, int width = 32, EMULATION_LINE) {   \
        unsigned lane = emulation::thread->lane;                                                                       \
        bool outside = (lane & (width - 1)) + delta >= (unsigned)width;                                                \
        return emulation::shuffle(mask, value, outside ? lane : lane + delta, line);                                   \
    }                                                                                                                  \
    static inline type __shfl_up_sync(unsigned mask, type value, unsigned delta, int width = 32, EMULATION_LINE) {     \
        unsigned lane = emulation::thread->lane;                                                                       \
        bool outside = (lane & (width - 1)) < delta;                                                                   \
        return emulation::shuffle(mask, value, outside ? lane : lane - delta, line);                                   \
    }
EMULATION_SHUFFLES(int)
EMULATION_SHUFFLES(unsigned)
EMULATION_SHUFFLES(float)
EMULATION_SHUFFLES(long)
EMULATION_SHUFFLES(unsigned long)
EMULATION_SHUFFLES(long long)
EMULATION_SHUFFLES(unsigned long long)
EMULATION_SHUFFLES(double)

static inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_LINE) {
    return emulation::runtime->vote(emulation::thread, mask, predicate != 0, line);
}
static inline int __any_sync(unsigned mask, int predicate, EMULATION_LINE) {
    return emulation::runtime->vote(emulation::thread, mask, predicate != 0, line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, EMULATION_LINE) {
    return emulation::runtime->vote(emulation::thread, mask, predicate == 0, line) == 0;
}

// With -fsanitize=thread the compiler calls these before each access to memory. (ThreadSanitizer itself is not there.)
#ifdef EMULATION_RACES
#define EMULATION_HOOK extern "C" __attribute__((visibility("hidden"), used, no_sanitize("thread"))) void
#define EMULATION_ACCESS(name, size, write)                                                                            \
    EMULATION_HOOK name(void *address) {                                                                               \
        emulation::runtime->access(emulation::thread, address, size, write, __builtin_return_address(0));              \
    }
#define EMULATION_ACCESSES(size)                                                                                       \
    EMULATION_ACCESS(__tsan_read##size, size, false)                                                                   \
    EMULATION_ACCESS(__tsan_write##size, size, true)
#define EMULATION_UNALIGNED(size)                                                                                      \
    EMULATION_ACCESS(__tsan_unaligned_read##size, size, false)                                                         \
    EMULATION_ACCESS(__tsan_unaligned_write##size, size, true)
EMULATION_ACCESSES(1)
EMULATION_ACCESSES(2)
EMULATION_ACCESSES(4)
EMULATION_ACCESSES(8)
EMULATION_ACCESSES(16)
EMULATION_UNALIGNED(2)
EMULATION_UNALIGNED(4)
EMULATION_UNALIGNED(8)
EMULATION_UNALIGNED(16)
EMULATION_HOOK __tsan_read_range(void *address, long size) {
    emulation::runtime->access(emulation::thread, address, size, false, __builtin_return_address(0));
}
EMULATION_HOOK __tsan_write_range(void *address, long size) {
    emulation::runtime->access(emulation::thread, address, size, true, __builtin_return_address(0));
}
EMULATION_HOOK __tsan_func_entry(void *) {}
EMULATION_HOOK __tsan_func_exit(void *) {}
EMULATION_HOOK __tsan_init() {}
#endif
