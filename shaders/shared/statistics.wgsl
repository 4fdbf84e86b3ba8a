// Statistics of a row: a reference m near its largest logit, NO_ENTRY if it has no entry; Σ exp(z − m);
// Σ exp(z − m)·z; Σ z; the number of entries.

const STATISTICS: u32 = 5u;

struct Statistics {
    reference: f32,
    sum: f32,
    along: f32,
    logits: f32,
    entries: f32,
}

// exp(of_part − reference), of a part without entries 0.
fn factor_of_part(of_part: f32, reference: f32) -> f32 {
    return select(exponential(of_part - reference), 0.0, of_part == NO_ENTRY);
}

// The statistics of two sets of entries together (online softmax, arXiv 1805.02867, eq. 4).
fn merged(a: Statistics, b: Statistics) -> Statistics {
    let reference = max(a.reference, b.reference);
    if (reference == NO_ENTRY) {
        return Statistics(NO_ENTRY, 0.0, 0.0, 0.0, 0.0);
    }
    let of_a = factor_of_part(a.reference, reference);
    let of_b = factor_of_part(b.reference, reference);
    return Statistics(
        reference,
        a.sum * of_a + b.sum * of_b,
        a.along * of_a + b.along * of_b,
        a.logits + b.logits,
        a.entries + b.entries,
    );
}
