//! Every operation that a training step is made of, one by one, on the CPU and at the step's shapes: those of
//! `benches/train_step.rs`. Throughput is in elements of the named tensor, or, in groups whose name ends in `FLOP`, in
//! floating-point operations: `elem/s` is then FLOP/s.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use nearfar::backend::PackedBatch;
use nearfar::backend::operations::{
    Activation, AdamW, Add, AttentionBackward, AttentionForward, AttentionShape, Clip, ColumnSum, Dropout,
    DropoutInPlace, EmbeddingBackward, EmbeddingForward, Fill, GeluBackward, L2NormBackward, L2NormForward,
    LayerNormBackward, LayerNormForward, MatMul, Pooling, PoolingBackward, PoolingForward, SquareSum,
};
use nearfar::{Device, Tensor};

/// The shapes of the training step.
mod shape {
    /// Queries, and as many documents.
    pub(crate) const BATCH: usize = 128;
    pub(crate) const QUERY_TOKENS: usize = 32;
    pub(crate) const DOCUMENT_TOKENS: usize = 64;
    /// S: the sequences of a step.
    pub(crate) const SEQUENCES: usize = 2 * BATCH;
    /// T: the rows of a step, one a token.
    pub(crate) const ROWS: usize = BATCH * (QUERY_TOKENS + DOCUMENT_TOKENS);
    /// C: the hidden size.
    pub(crate) const HIDDEN: usize = 128;
    pub(crate) const HEADS: usize = 2;
    pub(crate) const FEED_FORWARD: usize = 512;
    pub(crate) const VOCABULARY: usize = 30_522;
    pub(crate) const POSITIONS: usize = 256;
    pub(crate) const TOKEN_TYPES: usize = 2;
    pub(crate) const DROPOUT: f32 = 0.1;
    pub(crate) const EPSILON: f32 = 1e-12;
    /// The matrix products of a layer: name, columns in and columns out.
    pub(crate) const PRODUCTS: [(&str, usize, usize); 4] = [
        ("query_key_value", HIDDEN, 3 * HIDDEN),
        ("attention_output", HIDDEN, HIDDEN),
        ("feed_forward_in", HIDDEN, FEED_FORWARD),
        ("feed_forward_out", FEED_FORWARD, HIDDEN),
    ];
}

use shape::*;

/// Values in (-1, 1), the same for the same seed.
fn random<const N: usize>(device: &Device, extents: [usize; N], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..extents.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u32 << 23) as f32) - 1.0
        })
        .collect();
    device.tensor(&values, extents).unwrap()
}

fn dropout(site: u32) -> Option<Dropout> {
    Some(Dropout { probability: DROPOUT, seed: 1, step: 1, site, row_offset: 0 })
}

fn packed(device: &Device) -> PackedBatch {
    let tokens: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|i| {
            let length = if i < BATCH { QUERY_TOKENS } else { DOCUMENT_TOKENS };
            (0..length).map(|j| 1000 + ((i * 7919 + j * 104_729) % 29_000) as u32).collect()
        })
        .collect();
    let sequences: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    PackedBatch::new(device, &sequences, 0).unwrap()
}

/// A group of few samples: the noise of a whole operation is small beside its time.
fn group<'a>(criterion: &'a mut Criterion, name: &str, elements: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10);
    group.warm_up_time(std::time::Duration::from_millis(300));
    group.measurement_time(std::time::Duration::from_millis(1000));
    group.throughput(Throughput::Elements(elements as u64));
    group
}

fn matmul(criterion: &mut Criterion) {
    let device = &Device::cpu();
    for (name, inputs, outputs) in PRODUCTS {
        // A multiplication and an addition for each term.
        let flops = 2 * ROWS * inputs * outputs;
        let mut group = group(criterion, &format!("matmul/{name}/{ROWS}x{inputs}x{outputs}/FLOP"), flops);
        let x = random(device, [ROWS, inputs], 1);
        let weight = random(device, [outputs, inputs], 2);
        let bias = random(device, [outputs], 3);
        let upstream = random(device, [ROWS, outputs], 4);
        let mut y = device.zeros([ROWS, outputs]).unwrap();
        let mut before = device.zeros([ROWS, outputs]).unwrap();
        let mut d_weight = device.zeros([outputs, inputs]).unwrap();
        let mut d_x = device.zeros([ROWS, inputs]).unwrap();
        // Only the first product of the feed-forward network has an activation.
        let gelu = name == "feed_forward_in";
        group.bench_function(if gelu { "forward+bias+gelu" } else { "forward+bias" }, |bencher| {
            bencher.iter(|| {
                let activation =
                    if gelu { Activation::Gelu { input: Some(&mut before) } } else { Activation::Identity };
                device
                    .matmul(MatMul {
                        a: &x,
                        transpose_a: false,
                        b: &weight,
                        transpose_b: true,
                        bias: Some(&bias),
                        activation,
                        accumulate: false,
                        output: &mut y,
                    })
                    .unwrap();
            });
        });
        let plain = |a: &Tensor, transpose_a: bool, b: &Tensor, accumulate: bool, output: &mut Tensor| {
            device
                .matmul(MatMul {
                    a,
                    transpose_a,
                    b,
                    transpose_b: false,
                    bias: None,
                    activation: Activation::Identity,
                    accumulate,
                    output,
                })
                .unwrap();
        };
        group.bench_function("weight_gradient", |bencher| {
            bencher.iter(|| plain(&upstream, true, &x, true, &mut d_weight));
        });
        group.bench_function("input_gradient", |bencher| {
            bencher.iter(|| plain(&upstream, false, &weight, false, &mut d_x));
        });
        group.finish();
    }
}

fn elementwise(criterion: &mut Criterion) {
    let device = &Device::cpu();
    let input = random(device, [ROWS, FEED_FORWARD], 1);
    let mut group_gelu = group(criterion, &format!("gelu_backward/{ROWS}x{FEED_FORWARD}"), ROWS * FEED_FORWARD);
    // In place: a gradient that is multiplied over and over must neither vanish nor grow, or arithmetic on tiny numbers
    // is what would be measured. So it is filled anew each time, outside of the time taken.
    group_gelu.bench_function("gelu_backward", |bencher| {
        bencher.iter_batched_ref(
            || random(device, [ROWS, FEED_FORWARD], 2),
            |gradient| device.gelu_backward(GeluBackward { input: &input, gradient }).unwrap(),
            criterion::BatchSize::LargeInput,
        );
    });
    group_gelu.finish();

    let mut group_hidden = group(criterion, &format!("elementwise/{ROWS}x{HIDDEN}"), ROWS * HIDDEN);
    let x = random(device, [ROWS, HIDDEN], 3);
    let mut output = device.zeros([ROWS, HIDDEN]).unwrap();
    group_hidden.bench_function("fill", |bencher| {
        bencher.iter(|| device.fill(Fill { output: &mut output, value: 0.0 }).unwrap());
    });
    group_hidden.bench_function("add", |bencher| {
        bencher.iter(|| device.add(Add { input: &x, output: &mut output }).unwrap());
    });
    let mut output = random(device, [ROWS, HIDDEN], 4);
    // The same elements are dropped each time, and the others grow by 1/0.9: after thousands of times to infinity,
    // which takes no longer than any other number.
    group_hidden.bench_function("dropout", |bencher| {
        bencher.iter(|| {
            device.dropout(DropoutInPlace { dropout: dropout(1).unwrap(), output: &mut output }).unwrap();
        });
    });
    group_hidden.finish();
}

fn reduce(criterion: &mut Criterion) {
    let device = &Device::cpu();
    for width in [HIDDEN, 3 * HIDDEN, FEED_FORWARD] {
        let mut group = group(criterion, &format!("column_sum/{ROWS}x{width}"), ROWS * width);
        let input = random(device, [ROWS, width], 1);
        let mut output = device.zeros([width]).unwrap();
        group.bench_function("column_sum", |bencher| {
            bencher.iter(|| {
                device.column_sum(ColumnSum { input: &input, output: &mut output, accumulate: true }).unwrap();
            });
        });
        group.finish();
    }
    let mut group = group(criterion, &format!("square_sum/{VOCABULARY}x{HIDDEN}"), VOCABULARY * HIDDEN);
    let input = random(device, [VOCABULARY, HIDDEN], 1);
    let mut output = device.zeros([1]).unwrap();
    group.bench_function("square_sum", |bencher| {
        bencher.iter(|| {
            device.square_sum(SquareSum { input: &input, output: &mut output, accumulate: false }).unwrap();
        });
    });
    group.finish();
}

fn layer_norm(criterion: &mut Criterion) {
    let device = &Device::cpu();
    let mut group = group(criterion, &format!("layer_norm/{ROWS}x{HIDDEN}/dropout+residual"), ROWS * HIDDEN);
    let input = random(device, [ROWS, HIDDEN], 1);
    let residual = random(device, [ROWS, HIDDEN], 2);
    let upstream = random(device, [ROWS, HIDDEN], 3);
    let (gain, bias) = (random(device, [HIDDEN], 4), random(device, [HIDDEN], 5));
    let matrix = || device.zeros([ROWS, HIDDEN]).unwrap();
    let (mut output, mut normalised, mut d_input, mut d_residual) = (matrix(), matrix(), matrix(), matrix());
    let mut rstd = device.zeros([ROWS]).unwrap();
    let (mut d_gain, mut d_bias) = (device.zeros([HIDDEN]).unwrap(), device.zeros([HIDDEN]).unwrap());
    let mut forward = || {
        device
            .layer_norm_forward(LayerNormForward {
                input: &input,
                residual: Some(&residual),
                dropout: dropout(1),
                gain: &gain,
                bias: &bias,
                epsilon: EPSILON,
                output: &mut output,
                normalised: Some(&mut normalised),
                rstd: Some(&mut rstd),
            })
            .unwrap();
    };
    // Once in any case: the backward pass needs its results even if only that is asked for.
    forward();
    group.bench_function("forward", |bencher| bencher.iter(&mut forward));
    group.bench_function("backward", |bencher| {
        bencher.iter(|| {
            device
                .layer_norm_backward(LayerNormBackward {
                    upstream: &upstream,
                    normalised: &normalised,
                    rstd: &rstd,
                    gain: &gain,
                    dropout: dropout(1),
                    d_input: &mut d_input,
                    d_residual: Some(&mut d_residual),
                    d_gain: &mut d_gain,
                    d_bias: &mut d_bias,
                })
                .unwrap();
        });
    });
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let device = &Device::cpu();
    // Similarities and weighted sums are products of length·length·C terms each. The backward pass has five such
    // products, because it computes the similarities again.
    let product = 2 * BATCH * (QUERY_TOKENS.pow(2) + DOCUMENT_TOKENS.pow(2)) * HIDDEN;
    let batch = packed(device);
    let shape =
        AttentionShape { offsets: batch.offsets(), longest: batch.longest(), heads: HEADS, dropout: dropout(2) };
    let query_key_value = random(device, [ROWS, 3 * HIDDEN], 1);
    let upstream = random(device, [ROWS, HIDDEN], 2);
    let mut output = device.zeros([ROWS, HIDDEN]).unwrap();
    let mut log_sum_exp = device.zeros([ROWS, HEADS]).unwrap();
    let mut d_query_key_value = device.zeros([ROWS, 3 * HIDDEN]).unwrap();
    let mut group =
        group(criterion, &format!("attention/{SEQUENCES}x{QUERY_TOKENS}+{DOCUMENT_TOKENS}/FLOP"), 2 * product);
    let mut forward = || {
        device
            .attention_forward(AttentionForward {
                query_key_value: &query_key_value,
                shape,
                output: &mut output,
                log_sum_exp: Some(&mut log_sum_exp),
            })
            .unwrap();
    };
    forward();
    group.bench_function("forward", |bencher| bencher.iter(&mut forward));
    group.throughput(Throughput::Elements(5 * product as u64));
    group.bench_function("backward", |bencher| {
        bencher.iter(|| {
            device
                .attention_backward(AttentionBackward {
                    upstream: &upstream,
                    query_key_value: &query_key_value,
                    output: &output,
                    log_sum_exp: &log_sum_exp,
                    shape,
                    d_query_key_value: &mut d_query_key_value,
                })
                .unwrap();
        });
    });
    group.finish();
}

fn embedding(criterion: &mut Criterion) {
    let device = &Device::cpu();
    let mut group = group(criterion, &format!("embedding/{ROWS}x{HIDDEN}"), ROWS * HIDDEN);
    let batch = packed(device);
    let word = random(device, [VOCABULARY, HIDDEN], 1);
    let position = random(device, [POSITIONS, HIDDEN], 2);
    let token_type = random(device, [TOKEN_TYPES, HIDDEN], 3);
    let mut output = device.zeros([ROWS, HIDDEN]).unwrap();
    group.bench_function("forward", |bencher| {
        bencher.iter(|| {
            device
                .embedding_forward(EmbeddingForward {
                    tokens: batch.tokens(),
                    positions: batch.positions(),
                    word: &word,
                    position: &position,
                    token_type: &token_type,
                    output: &mut output,
                })
                .unwrap();
        });
    });
    let upstream = random(device, [ROWS, HIDDEN], 4);
    let mut d_word = device.zeros([VOCABULARY, HIDDEN]).unwrap();
    let mut d_position = device.zeros([POSITIONS, HIDDEN]).unwrap();
    let mut d_token_type = device.zeros([TOKEN_TYPES, HIDDEN]).unwrap();
    group.bench_function("backward", |bencher| {
        bencher.iter(|| {
            device
                .embedding_backward(EmbeddingBackward {
                    upstream: &upstream,
                    tokens: batch.tokens(),
                    order: batch.order(),
                    offsets: batch.offsets(),
                    d_word: &mut d_word,
                    d_position: &mut d_position,
                    d_token_type: &mut d_token_type,
                })
                .unwrap();
        });
    });
    group.finish();
}

fn pooling(criterion: &mut Criterion) {
    let device = &Device::cpu();
    let batch = packed(device);
    let input = random(device, [ROWS, HIDDEN], 1);
    let upstream = random(device, [SEQUENCES, HIDDEN], 2);
    let mut output = device.zeros([SEQUENCES, HIDDEN]).unwrap();
    let mut d_input = device.zeros([ROWS, HIDDEN]).unwrap();
    let mut group = group(criterion, &format!("pooling/{ROWS}x{HIDDEN}"), ROWS * HIDDEN);
    for (name, pooling, read) in [("mean", Pooling::Mean, ROWS), ("cls", Pooling::Cls, SEQUENCES)] {
        let offsets = batch.offsets();
        group.throughput(Throughput::Elements((read * HIDDEN) as u64));
        group.bench_function(format!("{name}/forward"), |bencher| {
            bencher.iter(|| {
                device
                    .pooling_forward(PoolingForward { input: &input, offsets, pooling, output: &mut output })
                    .unwrap();
            });
        });
        // Every row gets a gradient, be it zero.
        group.throughput(Throughput::Elements((ROWS * HIDDEN) as u64));
        group.bench_function(format!("{name}/backward"), |bencher| {
            bencher.iter(|| {
                device
                    .pooling_backward(PoolingBackward { upstream: &upstream, offsets, pooling, d_input: &mut d_input })
                    .unwrap();
            });
        });
    }
    group.finish();
}

fn l2_norm(criterion: &mut Criterion) {
    let device = &Device::cpu();
    let input = random(device, [SEQUENCES, HIDDEN], 1);
    let upstream = random(device, [SEQUENCES, HIDDEN], 2);
    let mut output = device.zeros([SEQUENCES, HIDDEN]).unwrap();
    let mut inverse_norm = device.zeros([SEQUENCES]).unwrap();
    let mut d_input = device.zeros([SEQUENCES, HIDDEN]).unwrap();
    let mut group = group(criterion, &format!("l2_norm/{SEQUENCES}x{HIDDEN}"), SEQUENCES * HIDDEN);
    let mut forward = || {
        device
            .l2_norm_forward(L2NormForward { input: &input, output: &mut output, inverse_norm: &mut inverse_norm })
            .unwrap();
    };
    forward();
    group.bench_function("forward", |bencher| bencher.iter(&mut forward));
    group.bench_function("backward", |bencher| {
        bencher.iter(|| {
            device
                .l2_norm_backward(L2NormBackward {
                    upstream: &upstream,
                    output: &output,
                    inverse_norm: &inverse_norm,
                    d_input: &mut d_input,
                })
                .unwrap();
        });
    });
    group.finish();
}

fn adamw(criterion: &mut Criterion) {
    let device = &Device::cpu();
    let elements = VOCABULARY * HIDDEN;
    let mut group = group(criterion, &format!("adamw/{VOCABULARY}x{HIDDEN}"), elements);
    let mut parameter = random(device, [VOCABULARY, HIDDEN], 1);
    let gradient = random(device, [VOCABULARY, HIDDEN], 2);
    let mut first_moment = device.zeros([VOCABULARY, HIDDEN]).unwrap();
    let mut second_moment = device.zeros([VOCABULARY, HIDDEN]).unwrap();
    let square_norm = device.tensor(&[elements as f32 / 3.0], [1]).unwrap();
    let mut step = 0;
    group.bench_function("clip", |bencher| {
        bencher.iter(|| {
            step += 1;
            device
                .adamw(AdamW {
                    parameter: &mut parameter,
                    gradient: &gradient,
                    first_moment: &mut first_moment,
                    second_moment: &mut second_moment,
                    clip: Some(Clip { square_norm: &square_norm, largest: 1.0 }),
                    learning_rate: 1e-3,
                    betas: (0.9, 0.999),
                    epsilon: 1e-8,
                    weight_decay: 0.01,
                    largest: f32::INFINITY,
                    step,
                })
                .unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, matmul, elementwise, reduce, layer_norm, attention, embedding, pooling, l2_norm, adamw);
criterion_main!(benches);
