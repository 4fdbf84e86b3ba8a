// From one floating point type to another.
//
//     output[i] = input[i], rounded to the nearest value, of two that are equally near to the even one, beyond the
//     range to infinity; what is no number stays none
//
// Two elements of 16 bits share a word, the first in the low half. `from_…` and `to_…` name the types, none of
// them bf16.
//
// Launch: blocks of 64 threads for 512 elements, `count` elements in all: eight each, or every 64th where they are not
// aligned.

#include "instructions.cuh"
#include "vectors.cuh"

#ifdef FORWARD
constexpr u32 THREADS = 64;
constexpr u32 TOGETHER = 8;

// Types of elements: how they lie in memory, and their values.
struct F32 {
    typedef u32 Bits;
    static __device__ __forceinline__ float widened(u32 bits) {
        return __uint_as_float(bits);
    }
    static __device__ __forceinline__ u32 narrowed(float value) {
        return __float_as_uint(value);
    }
};

struct F16 {
    typedef u16 Bits;
    static __device__ __forceinline__ float widened(u16 bits) {
        return of_f16(bits);
    }
    static __device__ __forceinline__ u16 narrowed(float value) {
        return f16_of(value);
    }
};

struct Bf16 {
    typedef u16 Bits;
    static __device__ __forceinline__ float widened(u16 bits) {
        return of_bf16(bits);
    }
    static __device__ __forceinline__ u16 narrowed(float value) {
        return bf16_of(value);
    }
};

// Eight elements, as many words of four as they take.
template <class Type> __device__ __forceinline__ void read_eight(const u32 *from, float (&values)[TOGETHER]) {
    constexpr int PER_WORD = 4 / sizeof(typename Type::Bits);
    constexpr int WORDS = TOGETHER / PER_WORD;
    u32 words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4 *>(from + i);
        words[i] = four.x;
        words[i + 1] = four.y;
        words[i + 2] = four.z;
        words[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < int(TOGETHER); i++) {
        const u32 word = words[i / PER_WORD] >> (32 / PER_WORD * (i % PER_WORD));
        values[i] = Type::widened(typename Type::Bits(word));
    }
}

template <class Type> __device__ __forceinline__ void write_eight(u32 *to, const float (&values)[TOGETHER]) {
    constexpr int PER_WORD = 4 / sizeof(typename Type::Bits);
    constexpr int WORDS = TOGETHER / PER_WORD;
    u32 words[WORDS] = {};
#pragma unroll
    for (int i = 0; i < int(TOGETHER); i++) {
        words[i / PER_WORD] |= u32(Type::narrowed(values[i])) << (32 / PER_WORD * (i % PER_WORD));
    }
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
        *reinterpret_cast<uint4 *>(to + i) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
}

template <class From, class To> __device__ __forceinline__ void convert(const u32 *input, u32 *output, u32 count) {
    const typename From::Bits *from = reinterpret_cast<const typename From::Bits *>(input);
    typename To::Bits *to = reinterpret_cast<typename To::Bits *>(output);
    const size_t first = size_t(blockIdx.x) * THREADS * TOGETHER;
    if (are_aligned(input, output) && first + THREADS * TOGETHER <= count) {
        const size_t at = first + TOGETHER * threadIdx.x;
        float values[TOGETHER];
        read_eight<From>(reinterpret_cast<const u32 *>(from + at), values);
        write_eight<To>(reinterpret_cast<u32 *>(to + at), values);
        return;
    }
    for (u32 i = 0; i < TOGETHER; i++) {
        const size_t at = first + i * THREADS + threadIdx.x;
        if (at < count) {
            to[at] = To::narrowed(From::widened(from[at]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(64) forward(
    const u32 *__restrict__ input, u32 *__restrict__ output, u32 count, OPTIONAL u32 from_f32, OPTIONAL u32 from_f16,
    OPTIONAL u32 to_f32, OPTIONAL u32 to_f16
) {
    if (from_f32) {
        if (to_f16) {
            convert<F32, F16>(input, output, count);
        } else {
            convert<F32, Bf16>(input, output, count);
        }
    } else if (from_f16) {
        if (to_f32) {
            convert<F16, F32>(input, output, count);
        } else {
            convert<F16, Bf16>(input, output, count);
        }
    } else if (to_f32) {
        convert<Bf16, F32>(input, output, count);
    } else {
        convert<Bf16, F16>(input, output, count);
    }
}
#endif
