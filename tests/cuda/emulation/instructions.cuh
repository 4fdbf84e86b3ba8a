// The emulation's version of kernels/shared/instructions.cuh: the same functions with the same layouts of fragments,
// without PTX. A product of tiles starts from d and adds one product after the other in order of k, each time with one
// rounding to f32. (A GPU adds several at once and does not round to nearest in between.)

#pragma once

#include "types.cuh"

// Round to nearest, ties to even. A NaN becomes the one NaN that the device makes.
static inline u16 f16_of(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x47800000u) return (u16)(sign | 0x7c00u); // 65,536 and above
    if (magnitude < 0x38800000u) {                              // below 2^-14: a multiple of 2^-24
        return (u16)(sign | (u32)rintf(__uint_as_float(magnitude) * 16777216.0f));
    }
    u32 rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return (u16)(sign | (rounded - 0x38000000u) >> 13);
}

static inline float of_f16(u16 bits) {
    u32 sign = (u32)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
    if (exponent == 0) return copysignf((float)fraction * (1.0f / 16777216.0f), __uint_as_float(sign));
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

static inline u16 bf16_of(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static inline float of_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

static inline u32 f16x2_of(float low, float high) { return f16_of(low) | (u32)f16_of(high) << 16; }

static inline u32 bf16x2_of(float low, float high) { return bf16_of(low) | (u32)bf16_of(high) << 16; }

#if __CUDA_ARCH__ >= 800

// Rounds to nearest, ties away from zero.
static inline u32 tf32_of(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
    if ((bits & 0x7fffffffu) == 0x7f800000u) return bits;
    return (bits + 0x1000u) & ~0x1fffu;
}

namespace emulation {

static inline void mma(Kind kind, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], unsigned line) {
    Call call = {kind, WHOLE_WARP, line, 0, a, b, d};
    runtime->whole(thread, &call);
}

} // namespace emulation

static inline void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], EMULATION_LINE) {
    emulation::mma(emulation::MMA_F16, d, a, b, line);
}

static inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], EMULATION_LINE) {
    emulation::mma(emulation::MMA_BF16, d, a, b, line);
}

static inline void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], EMULATION_LINE) {
    emulation::mma(emulation::MMA_TF32, d, a, b, line);
}

static inline void cp_async_16(void *shared, const void *global, bool valid, EMULATION_LINE) {
    emulation::runtime->copy(emulation::thread, shared, global, valid, line);
}

static inline void cp_async_commit() { emulation::runtime->commit(emulation::thread); }

template <int N> static inline void cp_async_wait() { emulation::runtime->wait(emulation::thread, N); }

#endif

#if __CUDA_ARCH__ >= 750

static inline void ldmatrix_x4(u32 (&r)[4], const void *row, EMULATION_LINE) {
    emulation::Call call = {emulation::LDMATRIX, WHOLE_WARP, line, 0, row, nullptr, r};
    emulation::runtime->whole(emulation::thread, &call);
}

static inline void ldmatrix_x4_trans(u32 (&r)[4], const void *row, EMULATION_LINE) {
    emulation::Call call = {emulation::LDMATRIX_TRANS, WHOLE_WARP, line, 0, row, nullptr, r};
    emulation::runtime->whole(emulation::thread, &call);
}

#endif
