// Statistics of a row: a reference m near its largest logit, NO_ENTRY if it has no entry; Σ exp(z − m);
// Σ exp(z − m)·z; Σ z; the number of entries.

#pragma once

#include "numerics.cuh"

// Numbers of a row.
constexpr u32 STATISTICS = 5;

struct Statistics {
    float reference;
    float sum;
    float along;
    float logits;
    float entries;
};

// Those of no entry.
__device__ __forceinline__ Statistics no_statistics() {
    return Statistics{NO_ENTRY, 0.0f, 0.0f, 0.0f, 0.0f};
}

// Reads those that begin at a place.
__device__ __forceinline__ Statistics load_statistics(const float *from) {
    return Statistics{from[0], from[1], from[2], from[3], from[4]};
}

// Writes them.
__device__ __forceinline__ void store_statistics(float *to, const Statistics &statistics) {
    to[0] = statistics.reference;
    to[1] = statistics.sum;
    to[2] = statistics.along;
    to[3] = statistics.logits;
    to[4] = statistics.entries;
}

// exp(of_part − reference), of a part without entries 0.
__device__ __forceinline__ float factor_of_part(float of_part, float reference) {
    return of_part == NO_ENTRY ? 0.0f : exponential(of_part - reference);
}

// The statistics of two sets of entries together (online softmax, arXiv 1805.02867, eq. 4).
__device__ __forceinline__ Statistics merged(const Statistics &a, const Statistics &b) {
    const float reference = a.reference > b.reference ? a.reference : b.reference;
    if (reference == NO_ENTRY) {
        return no_statistics();
    }
    const float of_a = factor_of_part(a.reference, reference);
    const float of_b = factor_of_part(b.reference, reference);
    return Statistics{
        reference,
        a.sum * of_a + b.sum * of_b,
        a.along * of_a + b.along * of_b,
        a.logits + b.logits,
        a.entries + b.entries,
    };
}
