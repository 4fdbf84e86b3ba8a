// One partition of an objective, row by row: everything around the row function, which is row_function.cu.
//
// A strip is `rows` rows, from `first_row` on. Its workspaces have for each row, and in it for each of `widths`
// prefixes of the embeddings, a line of `stride` columns: those of all blocks side by side. A launch is for one block,
// whose `width` columns begin at `column`. Matrix products write similarities and read gradients; this is what is left:
//
//     owners            keys[owners + c] = the pair i with offsets[i] ≤ c < offsets[i + 1]
//     own_products      similarities[r, k] = anchor r · candidate k of its own, over the values of a segment: those
//                       between two widths
//     normalise         similarities over segments → over prefixes; times both norms, or less both half squares
//     entries           logits = σ·s + bias, − margin on positives, + hardness·s on negatives; NO_ENTRY where masked
//                       positives = the weight of each positive, 0 of everything else
//     listed            both for positives that are listed
//     along_anchors     along[w, r] += σ · Σ_c g·s          without the s where half squares are subtracted
//     along_candidates  along[w, c] += σ · Σ_r g·s
//     segments          gradients of similarities → of dot products over segments
//     own_anchors       d_anchor[r] += σ · Σ_k g[r, k] · candidate k of its own
//     own_candidates    d_candidate[k of r] += σ · g[r, k] · anchor r
//
// Keys are ids, labels, segments of pairs, and where each pair's candidates begin, one after the other, those that are
// there; parameters say where.
//
// Launch: blocks that have so much each:
//     normalise, entries, segments   1,024 columns in x, rows in y; of entries, widths in z
//     listed, along_anchors          a row in x; of the latter, widths in y
//     along_candidates               32 columns, or 1,024 rows times columns if each row has its own, in x, widths in y
//     own_products                   8 rows times columns, a warp for each
//     owners                         256 candidates
//     own_anchors, own_candidates    1,024 values, 256 where four of them cannot be had at once
// Where there are more columns, rows times columns or values than the blocks in x have, they go on with the next ones;
// where there are fewer, the last blocks have nothing to do.

#include "numerics.cuh"
#include "quads.cuh"
#include "reduce.cuh"

// The place of keys that are not there, and the owner of candidates that belong to no pair.
constexpr u32 NOWHERE = 0xffffffff;

enum Rule : u32 {
    // Each row has candidates of its own.
    OWN = 1,
    // What belongs to the row's own pair is no entry.
    WITHOUT_OWN = 2,
    // Candidates are queries or documents, one of each pair.
    OF_PAIRS = 4,
    // The one of the row's own pair is its positive.
    OWN_POSITIVE = 8,
    // Hardness weighting is for what belongs to the row's own pair, and for what does not.
    HARD_OWN = 16,
    HARD_OTHERS = 32,
    // To hardness weighting, the candidates belong to nobody.
    NOBODYS = 64,
    // What looks like a positive is left out.
    FALSE_NEGATIVES = 128,
    // Half squares are subtracted where otherwise norms are multiplied with.
    HALVES = 256,
};

// A block's columns in a workspace.
struct Columns {
    u32 widths;
    u32 stride;
    u32 column;

    // Where they begin in a row.
    __device__ __forceinline__ size_t line(u32 row, u32 w) const {
        return (size_t(row) * widths + w) * stride + column;
    }
};

// The candidates that stand in the columns of a pair's row: its own, or all of them.
struct Range {
    u32 first;
    u32 end;
    u32 most;

    // The one of a column; another one of columns that nothing stands in.
    __device__ __forceinline__ u32 at(u32 column) const { return min(first + column, most); }
    __device__ __forceinline__ bool holds(u32 column) const { return first + column < end; }
};

__device__ __forceinline__ Range range_of(u32 pair, const u32 *keys, u32 candidate_count, u32 offsets, u32 rules) {
    Range range{0, candidate_count, candidate_count - 1};
    if (rules & OWN) {
        range.first = min(offsets == NOWHERE ? pair : keys[offsets + pair], candidate_count);
        range.end = min(offsets == NOWHERE ? pair + 1 : keys[offsets + pair + 1], candidate_count);
    }
    return range;
}

#ifdef OWNERS
extern "C" __global__ void __launch_bounds__(256) owners(
    u32 *__restrict__ keys, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride, u32 column, u32 width,
    u32 candidate_count, u32 offsets, u32 owners, u32 rules
) {
    const u32 candidate = blockIdx.x * 256 + threadIdx.x;
    if (candidate < candidate_count) {
        // The first pair whose candidates end beyond it.
        u32 low = 0;
        u32 high = pairs - 1;
        while (low < high) {
            const u32 middle = (low + high) / 2;
            if (keys[offsets + middle + 1] > candidate) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        keys[owners + candidate] = low;
    }
}
#endif

#ifdef OWN_PRODUCTS
extern "C" __global__ void __launch_bounds__(256) own_products(
    const u32 *__restrict__ keys, const float *__restrict__ anchors, const float *__restrict__ candidates,
    OPTIONAL const float *__restrict__ anchor_norms, OPTIONAL const float *__restrict__ candidate_norms,
    float *__restrict__ similarities, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride, u32 column, u32 width,
    u32 candidate_count, u32 offsets, u32 owners, u32 rules, u32 at_width, u32 segment, u32 segment_width,
    u32 embedding, u32 first_candidate, u32 end_candidate
) {
    const u32 element = blockIdx.x * (256 / WARP) + threadIdx.x / WARP;
    if (element >= rows * width) {
        return;
    }
    const u32 lane = threadIdx.x % WARP;
    const u32 row = element / width;
    const u32 pair = first_row + row;
    const Range range = range_of(pair, keys, candidate_count, offsets, rules);
    const u32 candidate = range.at(element % width);
    const bool there = range.holds(element % width);
    const bool here = there && candidate >= first_candidate && candidate < end_candidate;
    float sum = 0.0f;
    if (here) {
        const float anchor_norm = anchor_norms ? anchor_norms[pair] : 1.0f;
        const float candidate_norm = candidate_norms ? candidate_norms[candidate] : 1.0f;
        const float *const a = anchors + size_t(row) * embedding + segment;
        const float *const b = candidates + size_t(candidate - first_candidate) * embedding + segment;
        // Fours as far as they go, then what is left.
        const u32 end = have_fours(embedding | segment, anchors, candidates) ? segment_width / 4 * 4 : 0;
        float sums[4] = {};
#pragma unroll 4
        for (u32 i = 4 * lane; i < end; i += 4 * WARP) {
            const Floats<4> of_a = load<4>(a + i);
            const Floats<4> of_b = load<4>(b + i);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                sums[k] += (of_a.v[k] * anchor_norm) * (of_b.v[k] * candidate_norm);
            }
        }
        sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll 4
        for (u32 i = end + lane; i < segment_width; i += WARP) {
            sum += (a[i] * anchor_norm) * (b[i] * candidate_norm);
        }
    }
    sum = warp_sum(sum);
    // Where nothing stands, the workspace is to hold a number nevertheless.
    if (lane == 0 && (here || !there)) {
        similarities[Columns{widths, stride, column}.line(row, at_width) + element % width] = sum;
    }
}
#endif

#if defined(NORMALISE) || defined(SEGMENTS)
// The norms of candidates in these columns, of all candidates at one width.
__device__ __forceinline__ Floats<4> norms_of(const float *norms, const Quad &quad, const Range &range, u32 rules) {
    if ((rules & OWN) == 0) {
        return read_quad(norms, quad, 0.0f);
    }
    Floats<4> values{};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (quad.holds(i)) {
            values.v[i] = norms[range.at(quad.column(i))];
        }
    }
    return values;
}
#endif

#ifdef NORMALISE
extern "C" __global__ void __launch_bounds__(256) normalise(
    const u32 *__restrict__ keys, float *__restrict__ similarities, OPTIONAL const float *__restrict__ anchor_norms,
    OPTIONAL const float *__restrict__ candidate_norms, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride,
    u32 column, u32 width, u32 candidate_count, u32 offsets, u32 owners, u32 rules
) {
    const u32 row = blockIdx.y;
    const u32 pair = first_row + row;
    const Columns columns{widths, stride, column};
    const Range range = range_of(pair, keys, candidate_count, offsets, rules);
    const bool fours = have_fours(stride | column | candidate_count, similarities, candidate_norms);
    for (u32 tile = blockIdx.x * TILE_COLUMNS; tile < width; tile += gridDim.x * TILE_COLUMNS) {
        const Quad quad = quad_of(tile, width, fours);
        Floats<4> product{};
        for (u32 w = 0; w < widths; w++) {
            float *const line = similarities + columns.line(row, w);
            const Floats<4> of_segment = read_quad(line, quad, 0.0f);
            Floats<4> similarity;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                product.v[i] += of_segment.v[i];
                similarity.v[i] = product.v[i];
            }
            if (anchor_norms) {
                const float a = anchor_norms[size_t(w) * pairs + pair];
                const Floats<4> b = norms_of(candidate_norms + size_t(w) * candidate_count, quad, range, rules);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    similarity.v[i] = rules & HALVES ? product.v[i] - (a + b.v[i]) : product.v[i] * (a * b.v[i]);
                }
            }
            write_quad(line, quad, similarity);
        }
    }
}
#endif

#ifdef ENTRIES
// The segment of pairs that are padding.
constexpr u32 PADDING = 0xffffffff;

// What a column is to a row's pair.
struct Kind {
    bool is_positive;
    // It is no positive and is left out.
    bool is_masked;
    bool is_own;
};

// A row's pair and what its candidates are compared with.
struct Judge {
    const u32 *keys;
    u32 pair;
    u32 pairs;
    u32 rules;
    // Where keys of all pairs are, and those of this one.
    u32 ids;
    u32 labels;
    u32 segments;
    u32 owners;
    u32 id;
    u32 label;
    u32 segment;
    Range range;

    __device__ __forceinline__ bool has(u32 rule) const { return (rules & rule) != 0; }

    // The pair that a candidate belongs to.
    __device__ __forceinline__ u32 owner_of(u32 column) const {
        if (has(OF_PAIRS)) {
            return column;
        }
        return owners == NOWHERE ? NOWHERE : keys[owners + column];
    }

    __device__ __forceinline__ Kind of(u32 column) const {
        const bool is_padding = segments != NOWHERE && segment == PADDING;
        if (has(OWN)) {
            const bool is_its = has(OF_PAIRS) && column == 0 && (labels != NOWHERE || has(OWN_POSITIVE));
            return {!is_padding && is_its, is_padding || !range.holds(column), true};
        }
        const u32 owner = owner_of(column);
        const bool is_own = owner == pair;
        const bool is_known = owner < pairs;
        // Whether the pair is compared with candidates of that one.
        const bool together = segments == NOWHERE || !is_known || keys[segments + owner] == segment;
        const bool without = is_own && has(WITHOUT_OWN);
        bool is_positive = false;
        if (has(OF_PAIRS) && !is_padding) {
            is_positive = labels == NOWHERE
                ? has(OWN_POSITIVE) && is_own
                : is_known && !without && together && keys[labels + owner] == label;
        }
        const bool is_masked =
            is_padding || !together || without || (ids != NOWHERE && is_known && keys[ids + owner] == id);
        return {is_positive, is_masked, is_own};
    }
};

extern "C" __global__ void __launch_bounds__(256) entries(
    const u32 *__restrict__ keys, const float *__restrict__ similarities, float *__restrict__ logits,
    float *__restrict__ positives, const float *__restrict__ log_scale, OPTIONAL const float *__restrict__ bias,
    OPTIONAL const float *__restrict__ guide, OPTIONAL const float *__restrict__ references, u32 rows, u32 first_row,
    u32 pairs, u32 widths, u32 stride, u32 column, u32 width, u32 candidate_count, u32 offsets, u32 owners, u32 rules,
    u32 ids, u32 labels, u32 segments, u32 held, u32 held_step, float margin, float hardness, float above, float below
) {
    const u32 row = blockIdx.y;
    const u32 w = blockIdx.z;
    const u32 pair = first_row + row;
    const size_t line = Columns{widths, stride, column}.line(row, w);
    const size_t first_line = size_t(row) * stride + column;
    const Judge judge{
        keys,
        pair,
        pairs,
        rules,
        ids,
        labels,
        segments,
        owners,
        ids == NOWHERE ? 0 : keys[ids + pair],
        labels == NOWHERE ? 0 : keys[labels + pair],
        segments == NOWHERE ? 0 : keys[segments + pair],
        range_of(pair, keys, candidate_count, offsets, rules),
    };
    const float scale = exponential(log_scale[0]);
    const float shift = bias ? bias[0] : 0.0f;
    // What looks like a positive is above this, by what the guide finds or by what is trained.
    const bool by_guide = guide != nullptr;
    float most = 0.0f;
    if (judge.has(FALSE_NEGATIVES)) {
        // The row's own positive stands here.
        const u32 own_column = min(held + held_step * pair, stride - 1);
        const size_t at = by_guide ? row : size_t(row) * widths + w;
        const float *const rows_found = by_guide ? guide : similarities;
        const float positive = references ? references[at] : rows_found[at * stride + own_column];
        most = positive + above - below * fabsf(positive);
    }
    // Keys begin anywhere.
    const bool has_keys = (ids & labels & segments & owners) != NOWHERE;
    const bool fours = !has_keys && have_fours(stride | column, similarities, logits, positives, guide);
    for (u32 tile = blockIdx.x * TILE_COLUMNS; tile < width; tile += gridDim.x * TILE_COLUMNS) {
        const Quad quad = quad_of(tile, width, fours);
        const Floats<4> similarity = read_quad(similarities + line, quad, 0.0f);
        Floats<4> found = similarity;
        if (by_guide) {
            found = read_quad(guide + first_line, quad, 0.0f);
        }
        Floats<4> logit;
        Floats<4> weight;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            logit.v[i] = NO_ENTRY;
            weight.v[i] = 0.0f;
            if (!quad.holds(i)) {
                continue;
            }
            const Kind kind = judge.of(quad.column(i));
            const bool is_false_negative = judge.has(FALSE_NEGATIVES) && found.v[i] > most;
            if (kind.is_positive) {
                weight.v[i] = 1.0f;
                logit.v[i] = scale * similarity.v[i] + shift - margin;
            } else if (!kind.is_masked && !is_false_negative) {
                const bool is_hard = judge.has(kind.is_own && !judge.has(NOBODYS) ? HARD_OWN : HARD_OTHERS);
                logit.v[i] = scale * similarity.v[i] + shift + (is_hard ? hardness * similarity.v[i] : 0.0f);
            }
        }
        write_quad(logits + line, quad, logit);
        if (w == 0) {
            write_quad(positives + first_line, quad, weight);
        }
    }
}
#endif

#ifdef LISTED
extern "C" __global__ void __launch_bounds__(64) listed(
    const float *__restrict__ similarities, float *__restrict__ logits, float *__restrict__ positives,
    const u32 *__restrict__ list_offsets, const u32 *__restrict__ list_candidates,
    OPTIONAL const float *__restrict__ list_weights, const float *__restrict__ log_scale,
    OPTIONAL const float *__restrict__ bias, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride, u32 column,
    u32 width, u32 candidate_count, u32 offsets, u32 owners, u32 rules, float margin, u32 count
) {
    const u32 row = blockIdx.x;
    const u32 pair = first_row + row;
    const Columns columns{widths, stride, column};
    const u32 first = min(list_offsets[pair], count);
    const u32 end = min(list_offsets[pair + 1], count);
    for (u32 i = first + threadIdx.x; i < end; i += 64) {
        const u32 candidate = list_candidates[i];
        // What is listed twice weighs twice: the first time stands for all.
        bool is_first = candidate < width;
        for (u32 other = first; is_first && other < i; other++) {
            is_first = list_candidates[other] != candidate;
        }
        if (!is_first) {
            continue;
        }
        float weight = 0.0f;
        for (u32 other = i; other < end; other++) {
            if (list_candidates[other] == candidate) {
                weight += list_weights ? list_weights[other] : 1.0f;
            }
        }
        positives[size_t(row) * stride + column + candidate] = weight;
        for (u32 w = 0; w < widths; w++) {
            const size_t at = columns.line(row, w) + candidate;
            logits[at] = exponential(log_scale[0]) * similarities[at] + (bias ? bias[0] : 0.0f) - margin;
        }
    }
}
#endif

#ifdef ALONG_ANCHORS
extern "C" __global__ void __launch_bounds__(256) along_anchors(
    const float *__restrict__ similarities, const float *__restrict__ gradient, const float *__restrict__ log_scale,
    float *__restrict__ along, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride, u32 column, u32 width,
    u32 candidate_count, u32 offsets, u32 owners, u32 rules
) {
    const u32 row = blockIdx.x;
    const u32 w = blockIdx.y;
    const size_t line = Columns{widths, stride, column}.line(row, w);
    const bool fours = have_fours(stride | column, similarities, gradient);
    float sum = 0.0f;
    for (u32 tile = 0; tile < width; tile += TILE_COLUMNS) {
        const Quad quad = quad_of(tile, width, fours);
        const Floats<4> g = read_quad(gradient + line, quad, 0.0f);
        Floats<4> s{{1.0f, 1.0f, 1.0f, 1.0f}};
        if ((rules & HALVES) == 0) {
            s = read_quad(similarities + line, quad, 0.0f);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += g.v[i] * s.v[i];
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        along[size_t(w) * pairs + first_row + row] += exponential(log_scale[0]) * sum;
    }
}
#endif

#ifdef ALONG_CANDIDATES
// Columns of a block, a warp wide, and how many threads share each one's rows.
constexpr u32 BLOCK_COLUMNS = WARP;
constexpr u32 SHARERS = 1024 / BLOCK_COLUMNS;
// Rows that a thread reads at a time.
constexpr u32 HELD = 4;

extern "C" __global__ void __launch_bounds__(1024) along_candidates(
    const u32 *__restrict__ keys, const float *__restrict__ similarities, const float *__restrict__ gradient,
    const float *__restrict__ log_scale, float *__restrict__ along, u32 rows, u32 first_row, u32 pairs, u32 widths,
    u32 stride, u32 column, u32 width, u32 candidate_count, u32 offsets, u32 owners, u32 rules
) {
    __shared__ float parts[SHARERS][BLOCK_COLUMNS];
    const u32 w = blockIdx.y;
    const Columns columns{widths, stride, column};
    const bool has_halves = (rules & HALVES) != 0;
    const float scale = exponential(log_scale[0]);
    float *const of_width = along + size_t(w) * candidate_count;
    if (rules & OWN) {
        for (u32 element = blockIdx.x * 1024 + threadIdx.x; element < rows * width; element += gridDim.x * 1024) {
            const u32 row = element / width;
            const Range range = range_of(first_row + row, keys, candidate_count, offsets, rules);
            if (range.holds(element % width)) {
                const size_t at = columns.line(row, w) + element % width;
                of_width[range.at(element % width)] += scale * (gradient[at] * (has_halves ? 1.0f : similarities[at]));
            }
        }
        return;
    }
    const u32 lane = threadIdx.x % BLOCK_COLUMNS;
    const u32 sharer = threadIdx.x / BLOCK_COLUMNS;
    for (u32 first = blockIdx.x * BLOCK_COLUMNS; first < width; first += gridDim.x * BLOCK_COLUMNS) {
        float sum = 0.0f;
        if (first + lane < width) {
            // Several rows at a time, whose loads do not wait for each other.
            for (u32 row = sharer; row < rows; row += HELD * SHARERS) {
                float g[HELD];
                float s[HELD];
#pragma unroll
                for (u32 k = 0; k < HELD; k++) {
                    const bool is_there = row + k * SHARERS < rows;
                    const size_t at = columns.line(row + k * SHARERS, w) + first + lane;
                    g[k] = is_there ? gradient[at] : 0.0f;
                    s[k] = is_there && !has_halves ? similarities[at] : 1.0f;
                }
#pragma unroll
                for (u32 k = 0; k < HELD; k++) {
                    sum += g[k] * s[k];
                }
            }
        }
        parts[sharer][lane] = sum;
        __syncthreads();
        if (sharer == 0 && first + lane < width) {
#pragma unroll 4
            for (u32 other = 1; other < SHARERS; other++) {
                sum += parts[other][lane];
            }
            of_width[first + lane] += scale * sum;
        }
        __syncthreads();
    }
}
#endif

#ifdef SEGMENTS
extern "C" __global__ void __launch_bounds__(256) segments(
    const u32 *__restrict__ keys, float *__restrict__ gradient, OPTIONAL const float *__restrict__ anchor_norms,
    OPTIONAL const float *__restrict__ candidate_norms, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride,
    u32 column, u32 width, u32 candidate_count, u32 offsets, u32 owners, u32 rules
) {
    const u32 row = blockIdx.y;
    const u32 pair = first_row + row;
    const Columns columns{widths, stride, column};
    const Range range = range_of(pair, keys, candidate_count, offsets, rules);
    const bool fours = have_fours(stride | column | candidate_count, gradient, candidate_norms);
    for (u32 tile = blockIdx.x * TILE_COLUMNS; tile < width; tile += gridDim.x * TILE_COLUMNS) {
        const Quad quad = quad_of(tile, width, fours);
        // A segment belongs to its own prefix and to all longer ones.
        Floats<4> sum{};
        for (u32 w = widths; w-- > 0;) {
            float *const line = gradient + columns.line(row, w);
            const Floats<4> of_prefix = read_quad(line, quad, 0.0f);
            Floats<4> norms{{1.0f, 1.0f, 1.0f, 1.0f}};
            if (anchor_norms) {
                const float a = anchor_norms[size_t(w) * pairs + pair];
                norms = norms_of(candidate_norms + size_t(w) * candidate_count, quad, range, rules);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    norms.v[i] *= a;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum.v[i] += of_prefix.v[i] * norms.v[i];
            }
            write_quad(line, quad, sum);
        }
    }
}
#endif

#if defined(OWN_ANCHORS) || defined(OWN_CANDIDATES)
// Values side by side that one thread adds to.
template <int N_> struct Run {
    static constexpr int N = N_;
};

// Calls `of_run(Run<...>())` with four values if they can be had at once.
template <class OfRun> __device__ __forceinline__ void with_runs(bool fours, OfRun of_run) {
    if (fours) {
        of_run(Run<4>());
    } else {
        of_run(Run<1>());
    }
}
#endif

#ifdef OWN_ANCHORS
extern "C" __global__ void __launch_bounds__(256) own_anchors(
    const u32 *__restrict__ keys, const float *__restrict__ gradient, const float *__restrict__ log_scale,
    const float *__restrict__ candidates, OPTIONAL const float *__restrict__ candidate_norms,
    float *__restrict__ d_anchors, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride, u32 column, u32 width,
    u32 candidate_count, u32 offsets, u32 owners, u32 rules, u32 at_width, u32 segment, u32 segment_width,
    u32 embedding, u32 first_candidate, u32 end_candidate
) {
    const float scale = exponential(log_scale[0]);
    with_runs(have_fours(embedding | segment | segment_width, candidates, d_anchors), [&](auto length) {
        constexpr int N = decltype(length)::N;
        const u32 runs = segment_width / N;
        for (u32 run = blockIdx.x * 256 + threadIdx.x; run < rows * runs; run += gridDim.x * 256) {
            const u32 row = run / runs;
            const u32 i = segment + run % runs * N;
            const Range range = range_of(first_row + row, keys, candidate_count, offsets, rules);
            const u32 first = max(range.first, first_candidate);
            const u32 end = min(min(range.end, end_candidate), range.first + width);
            const float *const of_row = gradient + Columns{widths, stride, column}.line(row, at_width);
            float *const to = d_anchors + size_t(row) * embedding + i;
            Floats<N> total = load<N>(to);
            Floats<N> sum{};
            for (u32 candidate = first; candidate < end; candidate++) {
                const float norm = candidate_norms ? candidate_norms[candidate] : 1.0f;
                const float g = of_row[candidate - range.first];
                const Floats<N> values = load<N>(candidates + size_t(candidate - first_candidate) * embedding + i);
#pragma unroll
                for (int k = 0; k < N; k++) {
                    sum.v[k] += g * (values.v[k] * norm);
                }
            }
#pragma unroll
            for (int k = 0; k < N; k++) {
                total.v[k] += scale * sum.v[k];
            }
            store<N>(to, total);
        }
    });
}
#endif

#ifdef OWN_CANDIDATES
extern "C" __global__ void __launch_bounds__(256) own_candidates(
    const u32 *__restrict__ keys, const float *__restrict__ gradient, const float *__restrict__ log_scale,
    const float *__restrict__ anchors, OPTIONAL const float *__restrict__ anchor_norms,
    float *__restrict__ d_candidates, u32 rows, u32 first_row, u32 pairs, u32 widths, u32 stride, u32 column, u32 width,
    u32 candidate_count, u32 offsets, u32 owners, u32 rules, u32 at_width, u32 segment, u32 segment_width,
    u32 embedding, u32 first_candidate, u32 end_candidate
) {
    const float scale = exponential(log_scale[0]);
    with_runs(have_fours(embedding | segment | segment_width, anchors, d_candidates), [&](auto length) {
        constexpr int N = decltype(length)::N;
        const u32 runs = segment_width / N;
        for (u32 run = blockIdx.x * 256 + threadIdx.x; run < rows * width * runs; run += gridDim.x * 256) {
            const u32 i = segment + run % runs * N;
            const u32 at = run / runs % width;
            const u32 row = run / runs / width;
            const u32 pair = first_row + row;
            const Range range = range_of(pair, keys, candidate_count, offsets, rules);
            const u32 candidate = range.at(at);
            if (!range.holds(at) || candidate < first_candidate || candidate >= end_candidate) {
                continue;
            }
            const float norm = anchor_norms ? anchor_norms[pair] : 1.0f;
            const float g = scale * gradient[Columns{widths, stride, column}.line(row, at_width) + at];
            const Floats<N> values = load<N>(anchors + size_t(row) * embedding + i);
            float *const to = d_candidates + size_t(candidate - first_candidate) * embedding + i;
            Floats<N> total = load<N>(to);
#pragma unroll
            for (int k = 0; k < N; k++) {
                total.v[k] += g * (values.v[k] * norm);
            }
            store<N>(to, total);
        }
    });
}
#endif
