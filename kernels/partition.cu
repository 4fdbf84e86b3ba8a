// From the statistics of a partition's blocks, merged, to its losses and the coefficients of its gradients.
//
// With μ positives in the partition, S and T the sums of the statistics (N, 5), ε the smoothing, a the average,
// z⁺ = exp(log_scale)·similarity − margin and w_i = weight·row_weights[i]:
//
//     L = log( μ·exp z⁺ + S·exp m ) ;  K = μ + number of entries
//     losses[i]      += w_i·( L − (1−ε)·z⁺ − ε/K·(μ·z⁺ + Σ z) )
//     gradient[i]    += a·w_i·( −S·exp(m − L) + ε − μ·ε/K )
//     d_log_scale[i] += a·w_i·( T·exp(m − L) − ε/K·Σ z )
//     coefficients[i] = ( L, a·w_i, a·w_i·ε/K, 0 )
//
// Launch: blocks of 256 threads, a row each.

#include "statistics.cuh"

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(256) forward(
    OPTIONAL const float *__restrict__ statistics, const float *__restrict__ similarity,
    const float *__restrict__ log_scale, OPTIONAL const float *__restrict__ row_weights,
    float *__restrict__ coefficients, float *__restrict__ losses, float *__restrict__ gradient,
    float *__restrict__ d_log_scale, u32 rows, u32 first_row, float positives, float smoothing, float margin,
    float weight, float average
) {
    const u32 place = blockIdx.x * 256 + threadIdx.x;
    if (place >= rows) {
        return;
    }
    const size_t i = size_t(first_row) + place;
    const float of_loss = row_weights ? weight * row_weights[i] : weight;
    const float positive = exponential(log_scale[0]) * similarity[i] - margin;
    float largest = positive;
    float negatives = 0.0f;
    float along = 0.0f;
    float logits = 0.0f;
    float entries = positives;
    if (statistics) {
        // They are those of the rows of this launch.
        const Statistics blocks = load_statistics(statistics + size_t(place) * STATISTICS);
        if (blocks.reference != NO_ENTRY) {
            largest = positive < blocks.reference ? blocks.reference : positive;
            const float factor = exponential(blocks.reference - largest);
            negatives = blocks.sum * factor;
            along = blocks.along * factor;
            logits = blocks.logits;
            entries += blocks.entries;
        }
    }
    const float of_positives = positives * exponential(positive - largest);
    const float everything = negatives + of_positives;
    const float log_sum = logarithm(everything);
    // The log-sum-exp above the positive, without subtracting numbers of its size: for a loss near zero.
    float above = (largest - positive) + log_sum;
    if (positives == 1.0f && of_positives > negatives) {
        above = logarithm_of_one_plus(negatives / of_positives);
    }
    const float share = smoothing > 0.0f ? smoothing / entries : 0.0f;
    const float smoothed = smoothing * positive - share * (logits + positives * positive);
    losses[i] += of_loss * (above + smoothed);
    const float of_row = average * of_loss;
    gradient[i] += of_row * (smoothing - positives * share - negatives / everything);
    d_log_scale[i] += of_row * (along / everything - share * logits);
    coefficients[4 * i] = largest + log_sum;
    coefficients[4 * i + 1] = of_row;
    coefficients[4 * i + 2] = of_row * share;
    coefficients[4 * i + 3] = 0.0f;
}
#endif
