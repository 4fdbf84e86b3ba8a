//! Operations on a device of which it is claimed that its bindings are small, held to the CPU: tensors beyond a binding
//! are cut into several launches, and what is cut must come to the same.

use super::*;
use crate::backend::PackedBatch;
use crate::backend::operations::*;

/// The first device, with bindings of so many bytes; none on a machine without any.
fn device(binding: u64) -> Option<Device> {
    let mut wgpu = Wgpu::open(0, Settings::default()).ok()?;
    wgpu.engine.limits.max_storage_buffer_binding_size = binding;
    Some(Device::new(wgpu))
}

/// Numbers of (−1, 1).
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 5003.5 - 1.0).collect()
}

fn matrix(device: &Device, rows: usize, width: usize, seed: usize) -> Tensor {
    device.tensor(&values(rows * width, seed), [rows, width]).unwrap()
}

fn vector(device: &Device, length: usize, seed: usize) -> Tensor {
    device.tensor(&values(length, seed), [length]).unwrap()
}

/// Computes on the CPU and in small bindings, and compares.
#[track_caller]
fn agree(binding: u64, compute: impl Fn(&Device) -> Result<Vec<Tensor>>) {
    let Some(device) = device(binding) else { return };
    let (expected, found) = (compute(&Device::cpu()).unwrap(), compute(&device).unwrap());
    for (output, (expected, found)) in expected.iter().zip(&found).enumerate() {
        let (expected, found) = (expected.to_host::<f32>().unwrap(), found.to_host::<f32>().unwrap());
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (i, (expected, found)) in expected.iter().zip(&found).enumerate() {
            assert!((expected - found).abs() <= 1e-5 * largest, "output {output} at {i}: {found}, not {expected}");
        }
    }
}

const ROWS: usize = 700;
const WIDTH: usize = 130;
/// About 125 rows.
const BINDING: u64 = 1 << 16;
const DROPOUT: Dropout = Dropout { probability: 0.3, seed: 1 << 40 | 5, site: 2, step: 9, row_offset: 17 };

/// A batch of sequences of up to 20 tokens, one of which is every second one.
fn batch(device: &Device) -> PackedBatch {
    let lengths = [1usize, 20, 5, 3, 11, 2, 8];
    let sequences: Vec<Vec<u32>> = (0..98)
        .map(|s| (0..lengths[s % 7]).map(|t| if t % 2 == 0 { 41 } else { (s * 31 + t * 7) as u32 % 300 }).collect())
        .collect();
    let batch = PackedBatch::new(device, &sequences.iter().map(Vec::as_slice).collect::<Vec<_>>(), 0).unwrap();
    assert_eq!(batch.tokens().elements(), ROWS);
    batch
}

#[test]
fn elementwise() {
    agree(BINDING, |device| {
        let (input, mut gradient) = (matrix(device, ROWS, WIDTH, 1), matrix(device, ROWS, WIDTH, 2));
        device.gelu_backward(GeluBackward { input: &input, gradient: &mut gradient })?;
        device.dropout(DropoutInPlace { dropout: DROPOUT, output: &mut gradient })?;
        let [mut parameter, mut first] = [3, 4].map(|seed| matrix(device, ROWS, WIDTH, seed));
        let mut second = device.zeros([ROWS, WIDTH])?;
        device.adamw(AdamW {
            parameter: &mut parameter,
            gradient: &input,
            first_moment: &mut first,
            second_moment: &mut second,
            clip: None,
            learning_rate: 0.1,
            betas: (0.9, 0.999),
            epsilon: 1e-3,
            weight_decay: 0.1,
            largest: 0.5,
            step: 3,
        })?;
        Ok(vec![gradient, parameter, first, second])
    });
}

#[test]
fn layer_norm() {
    agree(BINDING, |device| {
        let [input, residual, upstream] = [1, 2, 3].map(|seed| matrix(device, ROWS, WIDTH, seed));
        let [gain, bias, mut d_gain, mut d_bias] = [4, 5, 6, 7].map(|seed| vector(device, WIDTH, seed));
        let [mut output, mut normalised, mut d_input, mut d_residual] = [8; 4].map(|s| matrix(device, ROWS, WIDTH, s));
        let mut rstd = vector(device, ROWS, 9);
        device.layer_norm_forward(LayerNormForward {
            input: &input,
            residual: Some(&residual),
            dropout: Some(DROPOUT),
            gain: &gain,
            bias: &bias,
            epsilon: 1e-5,
            output: &mut output,
            normalised: Some(&mut normalised),
            rstd: Some(&mut rstd),
        })?;
        device.layer_norm_backward(LayerNormBackward {
            upstream: &upstream,
            normalised: &normalised,
            rstd: &rstd,
            gain: &gain,
            dropout: Some(DROPOUT),
            d_input: &mut d_input,
            d_residual: Some(&mut d_residual),
            d_gain: &mut d_gain,
            d_bias: &mut d_bias,
        })?;
        Ok(vec![output, normalised, rstd, d_input, d_residual, d_gain, d_bias])
    });
}

#[test]
fn norms_and_positives() {
    agree(BINDING, |device| {
        let [input, upstream] = [1, 2].map(|seed| matrix(device, ROWS, WIDTH, seed));
        let [mut output, mut d_input, mut gradient] = [3; 3].map(|seed| matrix(device, ROWS, WIDTH, seed));
        let mut inverse = vector(device, ROWS, 4);
        device.l2_norm_forward(L2NormForward { input: &input, output: &mut output, inverse_norm: &mut inverse })?;
        device.l2_norm_backward(L2NormBackward {
            upstream: &upstream,
            output: &output,
            inverse_norm: &inverse,
            d_input: &mut d_input,
        })?;
        device.l2_norm_gradient(L2NormGradient { input: &input, gradient: &mut gradient })?;

        let widths = &[3, 70, WIDTH];
        let [mut norms, mut halves] = [5; 2].map(|seed| matrix(device, 3, ROWS, seed));
        for (norm, output) in [(PrefixNorm::Inverse, &mut norms), (PrefixNorm::HalfSquare, &mut halves)] {
            device.prefix_norms_forward(PrefixNormsForward { input: &input, widths, norm, output })?;
        }
        let (along, mut d_prefix) = (matrix(device, 3, ROWS, 6), matrix(device, ROWS, WIDTH, 7));
        device.prefix_norms_backward(PrefixNormsBackward {
            input: &input,
            widths,
            along: &along,
            inverse_norms: Some(&norms),
            d_input: &mut d_prefix,
        })?;

        let (log_scale, of_loss, one) = (vector(device, 1, 8), vector(device, ROWS, 9), vector(device, ROWS, 10));
        let [mut d_queries, mut d_documents] = [11, 12].map(|seed| matrix(device, ROWS, WIDTH, seed));
        let [mut similarity, mut d_log_scale] = [13; 2].map(|seed| vector(device, ROWS, seed));
        let norms_of_both = Some((&inverse, &one));
        device.positives_forward(PositivesForward {
            queries: &input,
            documents: &upstream,
            norms: norms_of_both,
            similarity: &mut similarity,
        })?;
        device.positives_backward(PositivesBackward {
            queries: &input,
            documents: &upstream,
            norms: norms_of_both,
            log_scale: &log_scale,
            similarity: &similarity,
            gradient: &of_loss,
            d_queries: &mut d_queries,
            d_documents: &mut d_documents,
            d_log_scale: &mut d_log_scale,
        })?;
        Ok(vec![
            output,
            inverse,
            d_input,
            gradient,
            norms,
            halves,
            d_prefix,
            similarity,
            d_queries,
            d_documents,
            d_log_scale,
        ])
    });
}

#[test]
fn embedding_and_pooling() {
    agree(BINDING, |device| {
        let batch = batch(device);
        let [word, mut d_word] = [1, 2].map(|seed| matrix(device, 300, WIDTH, seed));
        let [position, mut d_position] = [3, 4].map(|seed| matrix(device, 24, WIDTH, seed));
        let [token_type, mut d_token_type] = [5, 6].map(|seed| matrix(device, 2, WIDTH, seed));
        let [mut output, mut d_mean, mut d_first] = [7; 3].map(|seed| matrix(device, ROWS, WIDTH, seed));
        device.embedding_forward(EmbeddingForward {
            tokens: batch.tokens(),
            positions: batch.positions(),
            word: &word,
            position: &position,
            token_type: &token_type,
            output: &mut output,
        })?;
        device.embedding_backward(EmbeddingBackward {
            upstream: &output,
            tokens: batch.tokens(),
            order: batch.order(),
            offsets: batch.offsets(),
            d_word: &mut d_word,
            d_position: &mut d_position,
            d_token_type: &mut d_token_type,
        })?;
        let [mut mean, mut first] = [8; 2].map(|seed| matrix(device, 98, WIDTH, seed));
        for (pooling, pooled, d_input) in
            [(Pooling::Mean, &mut mean, &mut d_mean), (Pooling::Cls, &mut first, &mut d_first)]
        {
            let offsets = batch.offsets();
            device.pooling_forward(PoolingForward { input: &output, offsets, pooling, output: pooled })?;
            device.pooling_backward(PoolingBackward { upstream: pooled, offsets, pooling, d_input })?;
        }
        Ok(vec![output, d_word, d_position, d_token_type, mean, first, d_mean, d_first])
    });
}

fn attend(binding: u64, lengths: &[usize], heads: usize, width: usize, dropout: Option<Dropout>) {
    agree(binding, |device| {
        let ends = lengths.iter().scan(0, |end, &length| {
            *end += length as u32;
            Some(*end)
        });
        let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
        let (rows, longest) = (lengths.iter().sum(), lengths.iter().copied().max().unwrap_or(0));
        let offsets = device.tensor(&offsets, [offsets.len()])?;
        let shape = AttentionShape { offsets: &offsets, longest, heads, dropout };
        let (query_key_value, upstream) = (matrix(device, rows, 3 * width, 1), matrix(device, rows, width, 2));
        let (mut output, mut sums) = (matrix(device, rows, width, 3), matrix(device, rows, heads, 4));
        let mut gradient = matrix(device, rows, 3 * width, 5);
        device.attention_forward(AttentionForward {
            query_key_value: &query_key_value,
            shape,
            output: &mut output,
            log_sum_exp: Some(&mut sums),
        })?;
        device.attention_backward(AttentionBackward {
            upstream: &upstream,
            query_key_value: &query_key_value,
            output: &output,
            log_sum_exp: &sums,
            shape,
            d_query_key_value: &mut gradient,
        })?;
        Ok(vec![output, sums, gradient])
    });
}

#[test]
fn attention() {
    let short = [1usize, 0, 20, 5, 3, 11, 2, 8].repeat(14);
    attend(BINDING, &short, 5, WIDTH, Some(DROPOUT));
    attend(BINDING, &short, 3, 96, None);
    // Of each width that there are shaders for, read one at a time or four.
    for head_width in [7, 33, 64, 100, 256] {
        attend(1 << 27, &[1, 33, 0, 64, 97], 2, 2 * head_width, Some(DROPOUT));
    }
    attend(1 << 27, &[700], 1, 40, None);
}

#[test]
fn what_attention_cannot_do_is_an_error() {
    let Some(device) = device(BINDING) else { return };
    for (rows, width, message) in [(100, WIDTH, "max_storage_buffer_binding_size"), (2, 257, "up to 256")] {
        let offsets = device.tensor(&[0, rows as u32], [2]).unwrap();
        let shape = AttentionShape { offsets: &offsets, longest: rows, heads: 1, dropout: None };
        let query_key_value = device.zeros([rows, 3 * width]).unwrap();
        let mut output = device.zeros([rows, width]).unwrap();
        let arguments =
            AttentionForward { query_key_value: &query_key_value, shape, output: &mut output, log_sum_exp: None };
        let error = device.attention_forward(arguments).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// The same bits as on the CPU, of every half, and around every place where something is rounded.
#[test]
fn casts() {
    let Some(device) = device(BINDING) else { return };
    let cpu = Device::cpu();
    let bits = |tensor: Tensor| -> Vec<u32> {
        let wide = tensor.cast(DType::F32).unwrap().to_host::<f32>().unwrap();
        // Which of the values that are no number is a processor's own choice.
        wide.into_iter().map(|value| if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }).collect()
    };
    // An odd number of them.
    let steep = (0..=u32::from(u16::MAX)).flat_map(|high| {
        [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(high << 16 | low))
    });
    let values: Vec<f32> = steep.chain([1.0]).collect();
    for narrow in [DType::F16, DType::BF16] {
        let of = |device: &Device| device.tensor(&values, [values.len()]).unwrap().cast(narrow).unwrap();
        let (expected, found) = (of(&cpu), of(&device));
        for other in [DType::F16, DType::BF16] {
            assert_eq!(bits(found.cast(other).unwrap()), bits(expected.cast(other).unwrap()), "{narrow} {other}");
        }
        assert_eq!(bits(found), bits(expected), "{narrow}");
    }
    for count in [1, 2, 3, 511, 513] {
        let tensor = vector(&device, count, 1).cast(DType::F16).unwrap();
        let mut again = device.empty([count], DType::F16).unwrap();
        device.cast(Cast { input: &tensor, output: &mut again }).unwrap();
        assert_eq!(bits(again), bits(vector(&cpu, count, 1).cast(DType::F16).unwrap()));
    }
}
