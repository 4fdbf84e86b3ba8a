//! Lowering an objective to sweeps over similarity tiles.
//!
//! Two kinds of sweep cover every objective: a *rectangle* (the rows of one side against the columns of another) and a
//! *Gram* (one side against itself, whose matrix is symmetric, so half of its tiles suffice). The rectangle of queries
//! and documents is shared by the q→d direction, which reads its rows, and the d→q direction, which reads its columns.

use super::{Block, Objective};

/// A set of embeddings that a sweep reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The N queries.
    Queries,
    /// The N documents, the positives.
    Documents,
    /// The N·K hard negatives.
    HardNegatives,
}

/// Which entries of a sweep do not count. A row's positive is never lost by it: where the diagonal is left out of a
/// rectangle it is because the positive is handled apart, in a form that does not cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Everything counts.
    Nothing,
    /// The diagonal, and entries of two pairs that share an id where ids are given.
    DiagonalAndIds,
    /// Entries of a document and a hard negative of the same pair.
    OwnGroup,
}

/// One pass over the tiles of a similarity matrix that is never stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sweep {
    /// The embeddings whose similarities are the rows.
    pub rows: Side,
    /// The embeddings whose similarities are the columns; the same as the rows for a Gram.
    pub columns: Side,
    /// The partition in whose denominator of row r the entries of row r stand.
    pub row_partition: Option<usize>,
    /// The partition in whose denominator of row c the entries of column c stand.
    pub column_partition: Option<usize>,
    /// What is left out.
    pub mask: Mask,
}

impl Sweep {
    /// Whether the sweep is one side against itself: a symmetric matrix, whose rows and columns play both roles.
    pub fn is_gram(&self) -> bool {
        self.rows == self.columns
    }
}

impl Objective {
    /// The sweeps that compute this objective, with or without hard negatives in the batch.
    ///
    /// ```
    /// use nearfar::Objective;
    ///
    /// // One rectangle serves both directions; each tower's Gram adds its same-tower negatives.
    /// assert_eq!(Objective::samtone_bidirectional().plan(false).len(), 3);
    /// assert_eq!(Objective::symmetric().plan(false).len(), 1);
    /// ```
    pub fn plan(&self, hard_negatives: bool) -> Vec<Sweep> {
        let mut sweeps: Vec<Sweep> = Vec::new();
        for (p, partition) in self.partitions().iter().enumerate() {
            let of_rows =
                |rows, columns, mask| Sweep { rows, columns, row_partition: Some(p), column_partition: None, mask };
            for &block in &partition.blocks {
                let is_rectangle = |sweep: &&mut Sweep| (sweep.rows, sweep.columns) == (Side::Queries, Side::Documents);
                match block {
                    Block::QueryDocument => {
                        match sweeps.iter_mut().filter(is_rectangle).find(|sweep| sweep.row_partition.is_none()) {
                            Some(sweep) => sweep.row_partition = Some(p),
                            None => sweeps.push(of_rows(Side::Queries, Side::Documents, Mask::DiagonalAndIds)),
                        }
                        if hard_negatives {
                            sweeps.push(of_rows(Side::Queries, Side::HardNegatives, Mask::Nothing));
                        }
                    }
                    Block::DocumentQuery => {
                        match sweeps.iter_mut().filter(is_rectangle).find(|sweep| sweep.column_partition.is_none()) {
                            Some(sweep) => sweep.column_partition = Some(p),
                            None => sweeps.push(Sweep {
                                row_partition: None,
                                column_partition: Some(p),
                                ..of_rows(Side::Queries, Side::Documents, Mask::DiagonalAndIds)
                            }),
                        }
                    }
                    Block::QueryQuery => sweeps.push(of_rows(Side::Queries, Side::Queries, Mask::DiagonalAndIds)),
                    Block::DocumentDocument { hard_negatives: others } => {
                        sweeps.push(of_rows(Side::Documents, Side::Documents, Mask::DiagonalAndIds));
                        if others && hard_negatives {
                            sweeps.push(of_rows(Side::Documents, Side::HardNegatives, Mask::OwnGroup));
                        }
                    }
                }
            }
        }
        sweeps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gte_with_hard_negatives_needs_five_sweeps_of_one_partition() {
        let sweeps = Objective::gte().plan(true);
        assert_eq!(sweeps.len(), 5);
        assert_eq!((sweeps[0].row_partition, sweeps[0].column_partition), (Some(0), Some(0)));
        assert_eq!(sweeps.iter().filter(|sweep| sweep.is_gram()).count(), 2);
        assert_eq!(sweeps.last().unwrap().mask, Mask::OwnGroup);
        assert_eq!(Objective::gte().plan(false).len(), 3);
    }

    #[test]
    fn the_document_direction_alone_reads_columns() {
        use crate::objective::Partition;
        let partition = Partition { blocks: vec![Block::DocumentQuery], weight: 1.0 };
        let sweeps = Objective::new("document to query", vec![partition]).unwrap().plan(true);
        assert_eq!(sweeps.len(), 1);
        assert_eq!((sweeps[0].row_partition, sweeps[0].column_partition), (None, Some(0)));
    }
}
