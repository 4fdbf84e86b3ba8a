//! Lists of which flags and constants each entry point of a folder's files knows.

use super::Permutation;

/// What an entry point knows: flags, and constants with their values.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) file: &'static str,
    pub(crate) entry: &'static str,
    pub(crate) flags: Vec<&'static str>,
    pub(crate) constants: Vec<(&'static str, Vec<u32>)>,
}

impl Listed {
    /// Whether it knows everything that a permutation has.
    pub(crate) fn holds(&self, permutation: &Permutation) -> bool {
        let constant = |(name, value): &(&str, u32)| {
            self.constants.iter().any(|(of, values)| of == name && values.contains(value))
        };
        self.file == permutation.file
            && self.entry == permutation.entry
            && permutation.flags.iter().all(|flag| self.flags.contains(flag))
            && permutation.constants.len() == self.constants.len()
            && permutation.constants.iter().all(constant)
    }
}

/// The lines of a list of permutations, `FILE ENTRY: FLAG … NAME=VALUE,VALUE …`, the flags optional. Errors begin with
/// the list's name.
pub(crate) fn listed(name: &str, text: &'static str) -> Result<Vec<Listed>, String> {
    let mut all = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let wrong = || format!("{name}: cannot read `{line}`");
        let (head, rest) = line.split_once(':').ok_or_else(wrong)?;
        let (file, entry) = head.split_once(' ').ok_or_else(wrong)?;
        let (mut flags, mut constants) = (Vec::new(), Vec::new());
        for word in rest.split_whitespace() {
            match word.split_once('=') {
                None => flags.push(word),
                Some((name, values)) => {
                    let values = values.split(',').map(|value| value.parse().map_err(|_| wrong()));
                    constants.push((name, values.collect::<Result<Vec<u32>, String>>()?));
                }
            }
        }
        all.push(Listed { file, entry, flags, constants });
    }
    Ok(all)
}

/// Every permutation that the list allows.
#[cfg(test)]
pub(crate) fn permutations(listed: &[Listed]) -> Vec<Permutation> {
    let mut all = Vec::new();
    for Listed { file, entry, flags, constants } in listed {
        let mut here = vec![Permutation { file, entry, flags: Vec::new(), constants: Vec::new() }];
        for flag in flags {
            let with = here.clone().into_iter().map(|mut permutation| {
                permutation.flags.push(*flag);
                permutation.flags.sort_unstable();
                permutation
            });
            let with: Vec<Permutation> = with.collect();
            here.extend(with);
        }
        for (name, values) in constants {
            here = here
                .iter()
                .flat_map(|permutation| {
                    values.iter().map(move |&value| {
                        let mut permutation = permutation.clone();
                        permutation.constants.push((*name, value));
                        permutation.constants.sort_unstable();
                        permutation
                    })
                })
                .collect();
        }
        all.extend(here);
    }
    all
}
