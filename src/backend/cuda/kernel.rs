//! CUDA sources, what they say of their kernels, and their compilation.
//!
//! A file under `kernels/` belongs to one operation; its entries are the passes of that operation. What several files
//! need stands under `kernels/shared/`. One module is compiled for each entry and permutation: the name of the entry in
//! capitals is defined, and so are the flags and constants of the launch that `kernels/permutations` lists for it. All
//! others are known when the kernel runs: an argument of that name in small letters, or a pointer that is null.
//!
//! Arguments are bound by name, so the head of a kernel is read here:
//!
//! ```text
//! #ifdef FORWARD
//! extern "C" __global__ void __launch_bounds__(256) forward(
//!     const float *__restrict__ input, OPTIONAL float *__restrict__ rstd, u32 count, float epsilon
//! ) {
//! ```
//!
//! While working on a kernel, run a build with debug assertions with `NEARFAR_KERNELS=kernels`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use super::cache::{Cache, Key};
use super::driver::{Function, Gpu};
use super::nvrtc::{Compiled, Nvrtc};
use crate::Error;
use crate::backend::gpu::{self, Listed, Permutation, Scalar};

macro_rules! texts {
    ($(#[$doc:meta])* $table:ident: $folder:literal, $extension:literal; $($name:literal),* $(,)?) => {
        $(#[$doc])*
        pub(super) const $table: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../../kernels/", $folder, $name, $extension)))),*];
    };
}

texts! {
    /// Name and text of every file that has kernels.
    SOURCES: "", ".cu";
    "adamw",
    "aggregate",
    "attention",
    "cast",
    "dropout",
    "elementwise",
    "embedding",
    "gelu",
    "l2_norm",
    "layer_norm",
    "materialised",
    "matmul",
    "merge_statistics",
    "pair_scores",
    "partition",
    "pooling",
    "positives",
    "prefix_norms",
    "reduce",
    "row_function",
    "row_sweep",
    "similarity_sweep",
}

texts! {
    /// Name and text of what they include.
    HEADERS: "shared/", ".cuh";
    "block_totals",
    "columns",
    "dropout",
    "elements",
    "gelu",
    "hopper",
    "hopper_tile",
    "instructions",
    "numerics",
    "philox",
    "quads",
    "reduce",
    "row_norm",
    "rows",
    "scales",
    "statistics",
    "tensor_tile",
    "tile",
    "types",
    "vectors",
}

/// Which flags and constants each entry is compiled for.
pub(super) const PERMUTATIONS: &str = include_str!("../../../kernels/permutations");

/// What an argument is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The address of a buffer.
    Pointer {
        read_only: bool,
    },
    Scalar(Scalar),
    /// The 128 bytes of a tensor map.
    TensorMap,
}

/// An argument of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Argument {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Whether it is null, or 0, for a launch that does not give it.
    pub(super) optional: bool,
}

/// What a text says of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) file: &'static str,
    pub(super) entry: &'static str,
    /// Threads of a block.
    pub(super) threads: u32,
    /// In their order.
    pub(super) arguments: Vec<Argument>,
}

/// A file of the folder that `NEARFAR_KERNELS` names, for who works on kernels: builds with debug assertions read it
/// instead of what was compiled in, so that a change needs no build.
fn from_folder(file: &str) -> Option<&'static str> {
    let folder = std::env::var_os("NEARFAR_KERNELS").filter(|_| cfg!(debug_assertions))?;
    let text = std::fs::read_to_string(std::path::Path::new(&folder).join(file)).ok()?;
    Some(Box::leak(text.into_boxed_str()))
}

fn source(file: &str) -> Result<&'static str, String> {
    if let Some(text) = from_folder(&format!("{file}.cu")) {
        return Ok(text);
    }
    SOURCES
        .iter()
        .find(|(of, _)| *of == file)
        .map(|(_, text)| *text)
        .ok_or_else(|| format!("there is no file kernels/{file}.cu"))
}

/// The names by which headers are included, and their texts.
fn headers() -> Vec<(String, &'static str)> {
    let header = |(name, text): &(&str, &'static str)| {
        (format!("{name}.cuh"), from_folder(&format!("shared/{name}.cuh")).unwrap_or(text))
    };
    HEADERS.iter().map(header).collect()
}

/// What is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Architecture {
    number: u32,
    /// With what only this one has.
    specific: bool,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.number, if self.specific { "a" } else { "" })
    }
}

impl Architecture {
    /// The best that a compiler of some version knows for a device.
    pub(super) fn of((major, minor): (u32, u32), supported: &[u32], version: (i32, i32)) -> Result<Self, String> {
        let device = 10 * major + minor;
        // What was compiled for one runs on later ones of the same generation.
        let fits = |number: &&u32| **number / 10 == major && **number <= device;
        let number = supported.iter().filter(fits).max().ok_or_else(|| {
            let (newest, oldest) = (supported.iter().max().unwrap_or(&0), supported.iter().min().unwrap_or(&0));
            let what = if device > *newest { "newer" } else { "older" };
            format!(
                "NVRTC {}.{} compiles for sm_{oldest} to sm_{newest}, and not for this device, which has compute \
                 capability {major}.{minor}: a CUDA toolkit that is {what} is needed",
                version.0, version.1
            )
        })?;
        // Tensor memory copies and the products of warp groups are Hopper's alone.
        Ok(Self { number: *number, specific: *number == 90 && version >= (12, 0) })
    }

    /// Whether kernels may use what only this one has.
    pub(super) fn is_specific(self) -> bool {
        self.specific
    }

    #[cfg(test)]
    fn named(number: u32) -> Self {
        Self { number, specific: number == 90 }
    }
}

/// Options of the compiler for a permutation.
pub(super) fn options(permutation: &Permutation, architecture: Architecture) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        // Compilers before CUDA 13 take generic lambdas for functions of the host otherwise.
        "--device-as-default-execution-space".to_owned(),
        format!("-D{}", permutation.entry.to_uppercase()),
    ];
    options.extend(permutation.flags.iter().map(|flag| format!("-D{flag}")));
    options.extend(permutation.constants.iter().map(|(name, value)| format!("-D{name}={value}")));
    options
}

/// What is defined, and as what; nothing for macros with arguments.
type Macros = BTreeMap<String, String>;

/// What the options define.
fn macros(permutation: &Permutation, architecture: Architecture) -> Macros {
    let mut macros = Macros::from([("__CUDA_ARCH__".to_owned(), (10 * architecture.number).to_string())]);
    if architecture.specific {
        macros.insert(format!("__CUDA_ARCH_FEAT_SM{}_ALL", architecture.number), "1".into());
    }
    macros.insert(permutation.entry.to_uppercase(), "1".into());
    macros.extend(permutation.flags.iter().map(|flag| ((*flag).to_owned(), "1".to_owned())));
    macros.extend(permutation.constants.iter().map(|(name, value)| ((*name).to_owned(), value.to_string())));
    macros
}

/// A text without its comments; lines stay where they are.
fn without_comments(text: &str) -> String {
    let (mut output, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        output.push_str(&rest[..at]);
        let (comment, behind) = if rest[at..].starts_with("//") {
            rest[at..].split_at(rest[at..].find('\n').unwrap_or(rest.len() - at))
        } else {
            rest[at..].split_at(rest[at + 2..].find("*/").map_or(rest.len() - at, |end| end + 4))
        };
        output.push(' ');
        output.extend(comment.chars().filter(|&c| c == '\n'));
        rest = behind;
    }
    output.push_str(rest);
    output
}

/// The lines of a file that the compiler does not skip, without directives, and what is defined behind them.
fn visible(file: &str, text: &str, mut macros: Macros) -> Result<(String, Macros), String> {
    let text = without_comments(text);
    let mut output = String::new();
    // Of each condition around a line, whether it holds, and whether one of its branches has held so far.
    let mut conditions: Vec<(bool, bool)> = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let at = |what: &str| format!("kernels/{file}.cu:{}: {what}", number + 1);
        let Some(directive) = line.trim_start().strip_prefix('#') else {
            if conditions.iter().all(|(holds, _)| *holds) {
                output.push_str(line);
                output.push('\n');
            }
            continue;
        };
        let mut directive = directive.trim().to_owned();
        while directive.ends_with('\\') {
            directive.pop();
            directive.push_str(lines.next().map_or("", |(_, line)| line.trim_end()));
        }
        let (word, rest) = directive.split_once(|c: char| !c.is_ascii_alphabetic()).unwrap_or((&directive, ""));
        let rest = rest.trim();
        let outer = |depth: usize| conditions[..depth].iter().all(|(holds, _)| *holds);
        let shown = outer(conditions.len());
        let evaluated = |needed: bool| {
            if needed { evaluate(rest, &macros).map(|value| value != 0).map_err(|error| at(&error)) } else { Ok(false) }
        };
        match word {
            "ifdef" | "ifndef" => {
                let holds = macros.contains_key(rest) == (word == "ifdef");
                conditions.push((holds, holds));
            }
            "if" => {
                let holds = evaluated(shown)?;
                conditions.push((holds, holds));
            }
            "elif" | "else" => {
                let around = conditions.len().checked_sub(1).map(outer);
                let around = around.ok_or_else(|| at("a branch without a condition"))?;
                let (_, held) = conditions[conditions.len() - 1];
                let holds = !held && (word == "else" || evaluated(around)?);
                conditions.pop();
                conditions.push((holds, held || holds));
            }
            "endif" => {
                conditions.pop().ok_or_else(|| at("#endif without a condition"))?;
            }
            "define" if shown => {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
                let (name, value) = rest.split_at(end);
                macros.insert(name.to_owned(), if value.starts_with('(') { "" } else { value.trim() }.to_owned());
            }
            "undef" if shown => {
                macros.remove(rest);
            }
            _ => {}
        }
    }
    if conditions.is_empty() {
        Ok((output, macros))
    } else {
        Err(format!("kernels/{file}.cu: a condition without #endif"))
    }
}

/// The value of a condition, or of a number that is put together from others.
fn evaluate(text: &str, macros: &Macros) -> Result<i64, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let end = if first.is_ascii_alphanumeric() || first == '_' {
            rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else if ["||", "&&", "==", "!=", "<=", ">="].iter().any(|two| rest.starts_with(two)) {
            2
        } else {
            first.len_utf8()
        };
        let (token, behind) = rest.split_at(end);
        tokens.push(token);
        rest = behind.trim_start();
    }
    let cannot = || format!("cannot evaluate `{}`", text.trim());
    let (value, rest) = binary(&tokens, 0, macros).ok_or_else(cannot)?;
    if rest.is_empty() { Ok(value) } else { Err(cannot()) }
}

/// Operators, the loosest first.
const OPERATORS: [&[&str]; 6] =
    [&["||"], &["&&"], &["==", "!="], &["<", ">", "<=", ">="], &["+", "-"], &["*", "/", "%"]];

/// The value of the operators from some level on that tokens begin with, and the tokens behind.
fn binary<'a, 'b>(tokens: &'a [&'b str], level: usize, macros: &Macros) -> Option<(i64, &'a [&'b str])> {
    let Some(operators) = OPERATORS.get(level) else { return operand(tokens, macros) };
    let (mut value, mut rest) = binary(tokens, level + 1, macros)?;
    while let Some((operator, behind)) = rest.split_first().filter(|(first, _)| operators.contains(first)) {
        let right;
        (right, rest) = binary(behind, level + 1, macros)?;
        value = match *operator {
            "||" => i64::from(value != 0 || right != 0),
            "&&" => i64::from(value != 0 && right != 0),
            "==" => i64::from(value == right),
            "!=" => i64::from(value != right),
            "<" => i64::from(value < right),
            ">" => i64::from(value > right),
            "<=" => i64::from(value <= right),
            ">=" => i64::from(value >= right),
            "+" => value.checked_add(right)?,
            "-" => value.checked_sub(right)?,
            "*" => value.checked_mul(right)?,
            "/" => value.checked_div(right)?,
            _ => value.checked_rem(right)?,
        };
    }
    Some((value, rest))
}

fn operand<'a, 'b>(tokens: &'a [&'b str], macros: &Macros) -> Option<(i64, &'a [&'b str])> {
    let (first, rest) = tokens.split_first()?;
    match *first {
        "!" => operand(rest, macros).map(|(value, rest)| (i64::from(value == 0), rest)),
        "-" => operand(rest, macros).and_then(|(value, rest)| Some((value.checked_neg()?, rest))),
        "(" => {
            let (value, rest) = binary(rest, 0, macros)?;
            Some((value, rest.strip_prefix(&[")"])?))
        }
        "defined" => {
            let (name, rest) = match rest {
                ["(", name, ")", rest @ ..] | [name, rest @ ..] => (name, rest),
                [] => return None,
            };
            Some((i64::from(macros.contains_key(*name)), rest))
        }
        number if number.starts_with(|c: char| c.is_ascii_digit()) => {
            let digits = number.trim_end_matches(['u', 'U', 'l', 'L']);
            let value = match digits.strip_prefix("0x") {
                Some(digits) => i64::from_str_radix(digits, 16).ok()?,
                None => digits.parse().ok()?,
            };
            Some((value, rest))
        }
        name if name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') => match macros.get(name) {
            Some(text) => {
                let mut others = macros.clone();
                others.remove(name);
                Some((evaluate(text, &others).ok()?, rest))
            }
            // As the compiler does.
            None => Some((0, rest)),
        },
        _ => None,
    }
}

/// A text in parentheses, and what follows.
fn in_parentheses(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return text.strip_prefix('(').map(|inside| (&inside[..at.saturating_sub(1)], &text[at + 1..]));
        }
    }
    None
}

/// The name that a text begins with, and what follows.
fn name(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    (end > 0).then(|| (&text[..end], text[end..].trim_start()))
}

/// What stands between `__global__` and a kernel's body.
struct Head<'a> {
    name: &'a str,
    /// What `__launch_bounds__` says.
    bounds: Option<&'a str>,
    arguments: &'a str,
}

fn head(text: &str) -> Option<Head<'_>> {
    let (mut rest, mut bounds) = (text, None);
    loop {
        let (word, behind) = name(rest)?;
        if word.starts_with("__") && behind.starts_with('(') {
            let (inside, behind) = in_parentheses(behind)?;
            if word == "__launch_bounds__" {
                bounds = Some(inside);
            }
            rest = behind;
        } else if behind.starts_with('(') {
            let (arguments, _) = in_parentheses(behind)?;
            return Some(Head { name: word, bounds, arguments });
        } else {
            rest = behind;
        }
    }
}

fn argument(text: &str) -> Result<Argument, String> {
    let wrong = || {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        format!(
            "cannot read the argument `{text}`: it is none of `[const] TYPE *[__restrict__] NAME`, `u32 NAME`, `i32 NAME`, \
             `float NAME`, each with OPTIONAL before it or not, and `const __grid_constant__ CUtensorMap NAME`"
        )
    };
    let spaced = text.replace('*', " * ");
    let mut words: Vec<&str> = spaced.split_whitespace().collect();
    let last = words.pop().filter(|last| name(last) == Some((last, ""))).ok_or_else(wrong)?;
    let optional = words.first() == Some(&"OPTIONAL");
    let kind = match &words[usize::from(optional)..] {
        ["const", _, "*"] | ["const", _, "*", "__restrict__"] => Kind::Pointer { read_only: true },
        [_, "*"] | [_, "*", "__restrict__"] => Kind::Pointer { read_only: false },
        ["u32"] => Kind::Scalar(Scalar::U32),
        ["i32"] => Kind::Scalar(Scalar::I32),
        ["float"] => Kind::Scalar(Scalar::F32),
        ["const", "__grid_constant__", "CUtensorMap"] if !optional => Kind::TensorMap,
        _ => return Err(wrong()),
    };
    Ok(Argument { name: last.to_owned(), kind, optional })
}

/// What a file says of the kernel of a permutation.
pub(super) fn kernel(permutation: &Permutation, architecture: Architecture) -> Result<Kernel, String> {
    read_kernel(permutation, source(permutation.file)?, macros(permutation, architecture))
}

fn read_kernel(permutation: &Permutation, text: &str, macros: Macros) -> Result<Kernel, String> {
    let Permutation { file, entry, .. } = *permutation;
    let guard = entry.to_uppercase();
    let wrong = |what: &str| format!("kernels/{file}.cu: {entry}: {what}");
    let mut others = macros.clone();
    others.remove(&guard);
    let (seen, macros) = visible(file, text, macros)?;
    let (unguarded, _) = visible(file, text, others)?;
    let count = |text: &str| text.matches("__global__").count();
    let mut heads = seen.split("__global__").skip(1).filter_map(head).filter(|head| head.name == entry);
    let Head { bounds, arguments, .. } = heads.next().ok_or_else(|| wrong("there is no such kernel"))?;
    if heads.next().is_some() {
        return Err(wrong("there are two of them at once"));
    }
    if count(&unguarded) >= count(&seen) {
        return Err(wrong(&format!("it does not stand between `#ifdef {guard}` and `#endif`")));
    }
    if count(&seen) > 1 {
        return Err(wrong(&format!("`#ifdef {guard}` lets another kernel through")));
    }
    let head = seen.split("__global__").next().unwrap_or("").trim_end();
    if !head.ends_with("extern \"C\"") {
        return Err(wrong("it is not `extern \"C\"`"));
    }
    let bounds = bounds.ok_or_else(|| wrong("it has no `__launch_bounds__(THREADS)`"))?;
    let threads = evaluate(bounds.split(',').next().unwrap_or(""), &macros).map_err(|error| wrong(&error))?;
    let threads = u32::try_from(threads).ok().filter(|threads| (1..=1024).contains(threads));
    let threads = threads.ok_or_else(|| wrong(&format!("`__launch_bounds__({bounds})` is not 1 to 1024")))?;
    let arguments = if arguments.trim().is_empty() {
        Vec::new()
    } else {
        arguments.split(',').map(argument).collect::<Result<_, _>>().map_err(|error| wrong(&error))?
    };
    Ok(Kernel { file, entry, threads, arguments })
}

/// What `kernels/permutations` lists.
pub(super) fn listed() -> Result<Vec<Listed>, String> {
    gpu::listed("kernels/permutations", from_folder("permutations").unwrap_or(PERMUTATIONS))
}

/// What of a launch its kernel is compiled for; the rest it learns when it runs.
pub(super) fn compiled_for(listed: &[Listed], launch: &Permutation) -> Result<Permutation, String> {
    let lines = || listed.iter().filter(|listed| listed.file == launch.file && listed.entry == launch.entry);
    let mut permutation = launch.clone();
    permutation.flags.retain(|flag| lines().any(|line| line.flags.contains(flag)));
    permutation.constants.retain(|(name, _)| lines().any(|line| line.constants.iter().any(|(of, _)| of == name)));
    if lines().any(|line| line.holds(&permutation)) {
        Ok(permutation)
    } else {
        Err(format!("{permutation} is not among kernels/permutations"))
    }
}

/// Compiles a permutation, or says what is wrong with it.
pub(super) fn compile(nvrtc: &Nvrtc, permutation: &Permutation, options: &[String]) -> Result<Compiled, String> {
    let (file, headers) = (permutation.file, headers());
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, text)| (name.as_str(), *text)).collect();
    nvrtc
        .compile(&format!("{file}.cu"), source(file)?, &headers, options)
        .map_err(|log| format!("{permutation} cannot be compiled: {log}"))
}

/// What a compilation depends on.
fn key(nvrtc: &Nvrtc, permutation: &Permutation, options: &[String]) -> Result<Key, String> {
    let (version, headers) = (format!("{:?}", nvrtc.version()), headers());
    let parts = [version.as_str(), permutation.file, source(permutation.file)?];
    let options = options.iter().map(String::as_str);
    let headers = headers.iter().flat_map(|(name, text)| [name.as_str(), *text]);
    Ok(Key::of(parts.into_iter().chain(options).chain(headers)))
}

/// A kernel, and what it was compiled to when it is.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kernel: Kernel,
    permutation: Permutation,
    label: String,
    function: OnceLock<Function>,
    compiling: Mutex<()>,
}

impl Entry {
    /// The name of its permutation.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// The value of an argument that stands for a flag or a constant of a launch: 1 for a flag, and nothing for one
    /// that is not set or does not exist.
    pub(super) fn setting(launch: &Permutation, argument: &str) -> Option<u32> {
        let constant = launch.constants.iter().find(|(name, _)| name.eq_ignore_ascii_case(argument));
        let flag = || launch.flags.iter().any(|flag| flag.eq_ignore_ascii_case(argument)).then_some(1);
        constant.map(|(_, value)| *value).or_else(flag)
    }

    /// Flags and constants of a launch that it is neither compiled for nor has an argument for: each is to be that of an
    /// optional buffer.
    pub(super) fn unknown<'a>(&'a self, launch: &'a Permutation) -> impl Iterator<Item = &'static str> + 'a {
        let flags = launch.flags.iter().filter(|flag| !self.permutation.flags.contains(flag)).copied();
        let of = &self.permutation.constants;
        let constants = launch.constants.iter().map(|(name, _)| *name);
        let constants = constants.filter(|name| of.iter().all(|(of, _)| of != name));
        let arguments = &self.kernel.arguments;
        flags.chain(constants).filter(move |name| {
            let is = |argument: &Argument| {
                argument.kind == Kind::Scalar(Scalar::U32) && name.eq_ignore_ascii_case(&argument.name)
            };
            !arguments.iter().any(is)
        })
    }
}

/// What compiles.
struct Compiler {
    gpu: Arc<Gpu>,
    nvrtc: &'static Nvrtc,
    architecture: Architecture,
    cache: Option<Cache>,
}

impl Compiler {
    /// The function of an entry, compiled here if nobody else is at it. What went wrong is not remembered: there may be
    /// more memory the next time.
    fn function<'a>(&self, entry: &'a Entry) -> crate::Result<&'a Function> {
        if let Some(function) = entry.function.get() {
            return Ok(function);
        }
        let _alone = entry.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = entry.function.get() {
            return Ok(function);
        }
        let function = self.load(&entry.permutation)?;
        Ok(entry.function.get_or_init(|| function))
    }

    fn load(&self, permutation: &Permutation) -> crate::Result<Function> {
        let options = options(permutation, self.architecture);
        let key = key(self.nvrtc, permutation, &options).map_err(|reason| self.gpu.broken(reason))?;
        let kept = self.cache.as_ref().and_then(|cache| cache.get(key));
        if let Some(cubin) = kept {
            match self.gpu.load(&cubin, permutation.entry) {
                // Something else than what this compiler makes: it is made anew.
                Err(Error::Device { .. }) => {}
                loaded => return loaded,
            }
        }
        let compiled = compile(self.nvrtc, permutation, &options).map_err(|reason| self.gpu.broken(reason))?;
        match self.gpu.load(&compiled.cubin, permutation.entry) {
            Ok(function) => {
                if let Some(cache) = &self.cache {
                    cache.put(key, &compiled.cubin);
                }
                Ok(function)
            }
            Err(Error::Device { device, reason }) => {
                let ((major, minor), (of, least)) = (self.nvrtc.version(), self.gpu.driver().version());
                let versions = format!("compiled by NVRTC {major}.{minor}; the driver is for CUDA {of}.{least}");
                Err(Error::Device { device, reason: format!("{permutation}: {reason} ({versions})") })
            }
            Err(error) => Err(error),
        }
    }
}

/// All kernels that were asked for.
pub(super) struct Kernels {
    compiler: Arc<Compiler>,
    listed: Vec<Listed>,
    /// By what launches ask for; several may be the same.
    known: RwLock<HashMap<Permutation, Arc<Entry>>>,
    /// By what they are compiled for.
    entries: Mutex<HashMap<Permutation, Arc<Entry>>>,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernels({:?}, {})", self.compiler.gpu, self.compiler.architecture)
    }
}

impl Kernels {
    /// The kernels of a device; an error if there is no compiler for it.
    pub(super) fn new(gpu: Arc<Gpu>) -> crate::Result<Self> {
        let nvrtc = Nvrtc::load().map_err(|missing| gpu.broken(missing.to_string()))?;
        let capability = gpu.properties().capability;
        let architecture = Architecture::of(capability, &nvrtc.supported(), nvrtc.version());
        let architecture = architecture.map_err(|reason| gpu.broken(reason))?;
        let listed = listed().map_err(|reason| gpu.broken(reason))?;
        let compiler = Arc::new(Compiler { gpu, nvrtc, architecture, cache: Cache::open() });
        Ok(Self { compiler, listed, known: RwLock::default(), entries: Mutex::default() })
    }

    pub(super) fn architecture(&self) -> Architecture {
        self.compiler.architecture
    }

    pub(super) fn nvrtc(&self) -> &'static Nvrtc {
        self.compiler.nvrtc
    }

    /// What launches like this one run, compiled or not.
    pub(super) fn get(&self, launch: &Permutation) -> crate::Result<Arc<Entry>> {
        if let Some(found) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(launch) {
            return Ok(found.clone());
        }
        let broken = |reason| self.compiler.gpu.broken(reason);
        let permutation = compiled_for(&self.listed, launch).map_err(broken)?;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match entries.get(&permutation) {
            Some(entry) => entry.clone(),
            None => {
                let entry = Arc::new(Entry {
                    kernel: kernel(&permutation, self.compiler.architecture).map_err(broken)?,
                    label: permutation.to_string(),
                    permutation: permutation.clone(),
                    function: OnceLock::new(),
                    compiling: Mutex::default(),
                });
                entries.insert(permutation, entry.clone());
                entry
            }
        };
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(launch.clone(), entry.clone());
        Ok(entry)
    }

    /// An entry's function, when it is compiled.
    pub(super) fn wait<'a>(&self, entry: &'a Entry) -> crate::Result<&'a Function> {
        self.compiler.function(entry)
    }

    /// All entries so far.
    pub(super) fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// Every permutation that the list allows.
#[cfg(test)]
pub(super) fn permutations() -> Vec<Permutation> {
    gpu::permutations(&listed().unwrap())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use rayon::prelude::*;

    use super::*;
    use crate::backend::cuda::driver::{Driver, Launch, Value};

    fn permutation(entry: &'static str, flags: &[&'static str], constants: &[(&'static str, u32)]) -> Permutation {
        Permutation { file: "test", entry, flags: flags.to_vec(), constants: constants.to_vec() }
    }

    fn read(of: &Permutation, text: &str) -> Result<Kernel, String> {
        read_kernel(of, text, macros(of, Architecture::named(90)))
    }

    const TEXT: &str = r#"
        #include "types.cuh" // what it needs
        #define THREADS (2 * WIDTH)
        #define square(x) ((x) * (x))
        #ifdef FORWARD
        /* extern "C" __global__ void forward(int a); */
        extern "C" __global__ void __launch_bounds__(256) forward(
            const float *__restrict__ input, OPTIONAL const u16 *bits, // of two
            float *output, OPTIONAL float *__restrict__ rstd,
            u32 count, OPTIONAL i32 shift, float epsilon, const __grid_constant__ CUtensorMap map
        ) {
            other(input);
        }
        #elif defined(BACKWARD) && TILE >= 64
        #define WIDTH 64
        extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 2) backward() {}
        #endif
        #if defined BACKWARD && !(TILE >= 64) || __CUDA_ARCH__ < 800
        extern "C" __global__ void __launch_bounds__(TILE) backward(u32 one) {}
        #endif
    "#;

    #[test]
    fn heads_of_kernels_are_read() {
        let kernel = read(&permutation("forward", &[], &[]), TEXT).unwrap();
        assert_eq!((kernel.file, kernel.entry, kernel.threads), ("test", "forward", 256));
        let pointer = |read_only| Kind::Pointer { read_only };
        let expected = [
            ("input", pointer(true), false),
            ("bits", pointer(true), true),
            ("output", pointer(false), false),
            ("rstd", pointer(false), true),
            ("count", Kind::Scalar(Scalar::U32), false),
            ("shift", Kind::Scalar(Scalar::I32), true),
            ("epsilon", Kind::Scalar(Scalar::F32), false),
            ("map", Kind::TensorMap, false),
        ];
        let found: Vec<_> = kernel.arguments.iter().map(|of| (of.name.as_str(), of.kind, of.optional)).collect();
        assert_eq!(found, expected);
        for (tile, threads, arguments) in [(64, 128, 0), (32, 32, 1)] {
            let kernel = read(&permutation("backward", &[], &[("TILE", tile)]), TEXT).unwrap();
            assert_eq!((kernel.threads, kernel.arguments.len()), (threads, arguments));
        }
    }

    #[test]
    fn what_is_wrong_with_a_head_is_said() {
        let good = "#ifdef FORWARD\nextern \"C\" __global__ void __launch_bounds__(32) forward(u32 count) {}\n#endif\n";
        let forward = permutation("forward", &[], &[]);
        assert!(read(&forward, good).is_ok());
        let without_guard = good.replace("#ifdef FORWARD\n", "").replace("#endif\n", "");
        for (text, expected) in [
            (good.replace("forward(", "backward("), "no such kernel"),
            (without_guard, "does not stand between `#ifdef FORWARD`"),
            (format!("{good}{good}"), "two of them"),
            (good.replace("extern \"C\" ", ""), "not `extern \"C\"`"),
            (good.replace("__launch_bounds__(32) ", ""), "no `__launch_bounds__"),
            (good.replace("(32)", "(2048)"), "not 1 to 1024"),
            (good.replace("(32)", "(f(1))"), "cannot evaluate"),
            (good.replace("u32 count", "int count"), "`int count`"),
            (good.replace("u32 count", "u32 count, float **rows"), "`float **rows`"),
            (good.replace("u32 count", "u32 count,"), "cannot read the argument ``"),
            (good.replace("u32 count", "OPTIONAL CUtensorMap map"), "`OPTIONAL CUtensorMap map`"),
            (good.replace("#endif\n", ""), "without #endif"),
            (format!("{good}#if 1 +\n#endif"), "test.cu:4: cannot evaluate `1 +`"),
        ] {
            let error = read(&forward, &text).unwrap_err();
            assert!(error.contains(expected) && error.starts_with("kernels/test.cu"), "{error}");
        }
    }

    #[test]
    fn conditions_are_evaluated_as_in_c() {
        let macros =
            Macros::from([("A".into(), "D - 1".into()), ("B".into(), String::new()), ("D".into(), "4".into())]);
        for (text, expected) in [
            ("1 + 2 * 3 - 4 / 2", 5),
            ("(1 + 2) * 3 % 4", 1),
            ("!A || A == 3u && -A < 0x10", 1),
            ("defined(A) && defined B && !defined(C)", 1),
            ("C + 1 >= 2 || A != 3", 0),
        ] {
            assert_eq!(evaluate(text, &macros), Ok(expected), "{text}");
        }
        for text in ["", "B", "1 1", "(1", "1 / 0", "A ? 1 : 2", "defined", "9223372036854775807 + 1"] {
            assert!(evaluate(text, &macros).is_err(), "{text}");
        }
    }

    #[test]
    fn the_architecture_is_the_best_of_the_devices_generation() {
        let of = |capability, supported: &[u32]| {
            Architecture::of(capability, supported, (12, 8)).map(|architecture| architecture.to_string())
        };
        let all = [75, 80, 86, 87, 89, 90, 100, 120];
        for (capability, expected) in [
            ((7, 5), "sm_75"),
            ((8, 0), "sm_80"),
            ((8, 6), "sm_86"),
            ((8, 8), "sm_87"),
            ((8, 9), "sm_89"),
            ((9, 0), "sm_90a"),
            ((10, 0), "sm_100"),
            ((10, 3), "sm_100"),
            ((12, 1), "sm_120"),
        ] {
            assert_eq!(of(capability, &all).as_deref(), Ok(expected));
        }
        assert_eq!(Architecture::of((9, 0), &[90], (11, 8)).unwrap().to_string(), "sm_90");
        assert!(of((7, 0), &all).unwrap_err().contains("capability 7.0: a CUDA toolkit that is older"));
        assert!(of((13, 0), &all).unwrap_err().contains("a CUDA toolkit that is newer"));
    }

    #[test]
    fn a_launch_is_divided_into_what_is_compiled_and_what_is_not() {
        let listed = |flags: &[&'static str], constants: &[(&'static str, &[u32])]| Listed {
            file: "test",
            entry: "forward",
            flags: flags.to_vec(),
            constants: constants.iter().map(|(name, values)| (*name, values.to_vec())).collect(),
        };
        let all = [listed(&["A"], &[("TILE", &[64, 128])]), listed(&["B"], &[("MATRICES", &[1])])];
        let launch = permutation("forward", &["A", "C"], &[("D", 7), ("TILE", 64)]);
        let compiled = compiled_for(&all, &launch).unwrap();
        assert_eq!(compiled, permutation("forward", &["A"], &[("TILE", 64)]));
        assert_eq!(options(&compiled, Architecture::named(90))[3..], ["-DFORWARD", "-DA", "-DTILE=64"]);
        for wrong in [
            permutation("forward", &["A"], &[("TILE", 32)]),
            permutation("forward", &["A", "B"], &[("TILE", 64)]),
            permutation("forward", &["A"], &[]),
            permutation("backward", &[], &[]),
        ] {
            assert!(compiled_for(&all, &wrong).unwrap_err().contains("is not among kernels/permutations"));
        }
        assert_eq!(
            ["d", "c", "tile", "e"].map(|name| Entry::setting(&launch, name)),
            [Some(7), Some(1), Some(64), None]
        );
        let argument = |name: &str, kind| Argument { name: name.into(), kind, optional: false };
        let arguments = vec![argument("d", Kind::Scalar(Scalar::U32)), argument("c", Kind::TensorMap)];
        let entry = Entry {
            kernel: Kernel { file: "test", entry: "forward", threads: 32, arguments },
            label: compiled.to_string(),
            permutation: compiled,
            function: OnceLock::new(),
            compiling: Mutex::default(),
        };
        assert_eq!(entry.unknown(&launch).collect::<Vec<_>>(), ["C"]);
    }

    #[test]
    fn every_file_is_listed() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        for (folder, extension, table) in [(root.clone(), "cu", SOURCES), (root.join("shared"), "cuh", HEADERS)] {
            let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            let names = files.filter(|path| path.extension().is_some_and(|of| of == extension));
            let names: BTreeSet<_> = names.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
            assert_eq!(names, table.iter().map(|(name, _)| (*name).to_owned()).collect::<BTreeSet<_>>());
        }
        let listed = listed().unwrap();
        for (file, text) in SOURCES {
            let text = without_comments(text);
            for entry in text.split("__global__").skip(1).filter_map(head) {
                let name = entry.name;
                assert!(listed.iter().any(|of| of.file == *file && of.entry == name), "{file} {name} is not listed");
            }
        }
    }

    #[test]
    fn the_head_of_every_permutation_is_read() {
        for number in [75, 80, 90, 100] {
            for permutation in permutations() {
                let kernel = kernel(&permutation, Architecture::named(number)).unwrap();
                let names: BTreeSet<&str> = kernel.arguments.iter().map(|argument| argument.name.as_str()).collect();
                assert_eq!(names.len(), kernel.arguments.len(), "{permutation}: two arguments of one name");
                let bytes = |argument: &Argument| match argument.kind {
                    Kind::Pointer { .. } => 8,
                    Kind::Scalar(_) => 4,
                    Kind::TensorMap => 128,
                };
                assert!(kernel.arguments.iter().map(bytes).sum::<usize>() <= 4096, "{permutation}: too many arguments");
            }
        }
    }

    /// Where there is a device: what was compiled runs, and so does what was kept of it.
    #[test]
    fn kernels_are_compiled_once_and_launched() {
        let Some(_) = Driver::get().ok().filter(|driver| driver.devices() > 0) else { return };
        let Ok(nvrtc) = Nvrtc::load() else { return };
        let gpu = Arc::new(Gpu::open("cuda:0", 0).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let fill = Permutation { file: "elementwise", entry: "fill", flags: Vec::new(), constants: Vec::new() };
        let address = gpu.allocate(4000).unwrap();
        for round in 0..3u32 {
            let mut kernels = Kernels::new(gpu.clone()).unwrap();
            Arc::get_mut(&mut kernels.compiler).unwrap().cache = Some(Cache::at(folder.path()));
            if round == 2 {
                // What is whole but no module is made anew.
                let key = key(nvrtc, &fill, &options(&fill, kernels.architecture())).unwrap();
                Cache::at(folder.path()).put(key, &[7; 200]);
            }
            let entry = kernels.get(&fill).unwrap();
            assert!(Arc::ptr_eq(&entry, &kernels.get(&fill).unwrap()) && kernels.entries().len() == 1);
            let value = round as f32 + 0.5;
            let word = |argument: &Argument| match argument.name.as_str() {
                "output" => Value::Word(address),
                "count" => Value::Word(1000),
                "value" => Value::Word(u64::from(value.to_bits())),
                other => panic!("{other}"),
            };
            let arguments: Vec<Value> = entry.kernel.arguments.iter().map(word).collect();
            let (threads, function) = (entry.kernel.threads, kernels.wait(&entry).unwrap());
            let launch = Launch { function, grid: [1000, 1, 1], threads, shared: 0, arguments: &arguments };
            let mut found = [0; 4000];
            // SAFETY: the arguments are those of the kernel, and there is room for as many elements.
            unsafe {
                gpu.launch(&launch, entry.label()).unwrap();
                gpu.download(address, &mut found).unwrap();
            }
            assert!(found.chunks(4).all(|bytes| bytes == value.to_ne_bytes()), "{round}");
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
        // SAFETY: nobody uses it any more.
        unsafe { gpu.free(address).unwrap() };
    }

    /// What the compiler says of a kernel: registers of a thread, bytes of static shared memory of a block, bytes spilled.
    fn resources(log: &str) -> Option<[u32; 3]> {
        let before = |word: &str| {
            let line = log.lines().find(|line| line.contains(word))?;
            line[..line.find(word)?].split_whitespace().last()?.parse::<u32>().ok()
        };
        Some([before(" registers")?, before(" bytes smem").unwrap_or(0), before(" bytes spill stores")?])
    }

    /// Where there is a compiler of NVIDIA's: everything compiles for every architecture, stays in registers, and takes
    /// what `kernels/resources` says, which `NEARFAR_BLESS=1` writes anew.
    #[test]
    fn every_permutation_takes_what_is_known() {
        let Ok(nvrtc) = Nvrtc::load() else { return println!("skipped: there is no NVRTC") };
        let version = format!("# NVRTC {}.{}", nvrtc.version().0, nvrtc.version().1);
        let architectures = [75, 80, 90, 100].map(Architecture::named);
        let all = permutations();
        let take = |(permutation, architecture): (&Permutation, Architecture)| {
            let mut options = options(permutation, architecture);
            options.push("--ptxas-options=-v".into());
            let compiled = compile(nvrtc, permutation, &options);
            let log = compiled.unwrap_or_else(|log| panic!("{architecture}: {log}")).log;
            (permutation.to_string(), architecture.to_string(), resources(&log))
        };
        if take((&all[0], architectures[0])).2.is_none() {
            return println!("skipped: this is another compiler");
        }
        let both = all.par_iter().flat_map_iter(|permutation| architectures.map(move |of| (permutation, of)));
        let found: Vec<_> = both.map(take).collect();
        let mut table = String::from(
            "# What kernels take: registers of a thread / bytes of static shared memory of a block / bytes spilled.\n\
             # A test compiles every permutation and compares; NEARFAR_BLESS=1 has it write this file.\n",
        );
        table.push_str(&version);
        let mut spills = Vec::new();
        for (permutation, architecture, resources) in &found {
            let [registers, shared, spilled] = resources.unwrap_or_else(|| panic!("{permutation}, {architecture}"));
            if spilled > 0 {
                spills.push(format!("{permutation}, {architecture}: {spilled} bytes are spilled"));
            }
            if architecture == "sm_75" {
                table.push_str(&format!("\n{permutation}:"));
            }
            table.push_str(&format!(" {architecture} {registers}/{shared}/{spilled}"));
        }
        table.push('\n');
        assert!(spills.is_empty(), "{}", spills.join("\n"));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/resources");
        if std::env::var_os("NEARFAR_BLESS").is_some() {
            std::fs::write(&path, &table).unwrap();
        }
        let known = std::fs::read_to_string(&path).unwrap();
        if !known.contains(&version) {
            return println!("not compared: kernels/resources is of another version than {}", &version[2..]);
        }
        let wrong = known.lines().zip(table.lines()).find(|(known, found)| known != found);
        assert!(known == table, "kernels/resources is of other kernels, first at: {wrong:?}");
    }
}
