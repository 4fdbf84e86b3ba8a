// The statistics of two parts of the same rows become those of the whole.
//
//     statistics[i] = merged(statistics[i], part[i])          both (N, 5)
//
// Launch: blocks of 256 threads, a row each.

#include "statistics.cuh"

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(256) forward(
    const float *__restrict__ part, float *__restrict__ statistics, u32 rows, u32 statistics_base
) {
    const u32 row = blockIdx.x * 256 + threadIdx.x;
    if (row < rows) {
        float *whole = statistics + statistics_base + size_t(row) * STATISTICS;
        store_statistics(whole, merged(load_statistics(whole), load_statistics(part + size_t(row) * STATISTICS)));
    }
}
#endif
