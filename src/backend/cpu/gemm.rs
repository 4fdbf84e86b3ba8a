//! Products of matrices in memory: the `gemm` crate behind checked views.

/// A matrix that is read: element (r, c) is `data[r · row_stride + c · column_stride]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> MatRef<'a> {
    /// Rows of `columns` elements that begin every `row_stride` elements.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || columns == 0 || data.len() >= (rows - 1) * row_stride + columns);
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix that is written, in rows.
#[derive(Debug)]
pub(super) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// Rows of `columns` elements that begin every `row_stride` elements.
    pub(super) fn new(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(row_stride >= columns || rows <= 1);
        assert!(rows == 0 || columns == 0 || data.len() >= (rows - 1) * row_stride + columns);
        Self { data, rows, columns, row_stride }
    }
}

/// `output = a · b`, or `output += a · b`, scaled by `factor`; on the calling thread alone.
pub(super) fn multiply(output: MatMut<'_>, a: MatRef<'_>, b: MatRef<'_>, factor: f32, accumulate: bool) {
    assert!(a.rows == output.rows && b.columns == output.columns && a.columns == b.rows);
    if output.rows == 0 || output.columns == 0 {
        return;
    }
    if a.columns == 0 {
        if !accumulate {
            for row in output.data.chunks_mut(output.row_stride.max(1)).take(output.rows) {
                row[..output.columns].fill(0.0);
            }
        }
        return;
    }
    // SAFETY: the views were checked against their slices when they were made: with r < rows and c < columns every
    // element they name is inside, and `output` is borrowed exclusively.
    unsafe {
        gemm::gemm(
            output.rows,
            output.columns,
            a.columns,
            output.data.as_mut_ptr(),
            1,
            output.row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_orientations_agree_with_the_definition() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * k).map(|i| i as f32 - 4.0).collect();
        let b: Vec<f32> = (0..k * n).map(|i| 2.0 - i as f32).collect();
        let transpose = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
            (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
        };
        let expected: Vec<f32> =
            (0..m * n).map(|i| 1.0 + 2.0 * (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum::<f32>()).collect();
        let (a_t, b_t) = (transpose(&a, m, k), transpose(&b, k, n));
        for (left, right) in [(false, false), (false, true), (true, false), (true, true)] {
            let left = if left { MatRef::new(&a_t, k, m, m).transposed() } else { MatRef::new(&a, m, k, k) };
            let right = if right { MatRef::new(&b_t, n, k, k).transposed() } else { MatRef::new(&b, k, n, n) };
            let mut output = vec![1.0; m * n];
            multiply(MatMut::new(&mut output, m, n, n), left, right, 2.0, true);
            assert_eq!(output, expected);
        }
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_view_beyond_its_slice_is_refused() {
        MatRef::new(&[0.0; 5], 2, 3, 3);
    }

    #[test]
    fn an_empty_sum_is_zero() {
        let mut output = [1.0; 4];
        multiply(MatMut::new(&mut output, 2, 2, 2), MatRef::new(&[], 2, 0, 0), MatRef::new(&[], 0, 2, 2), 1.0, false);
        assert_eq!(output, [0.0; 4]);
    }
}
