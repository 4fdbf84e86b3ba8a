//! Entry points of shaders, compiled.
//!
//! The first launch of an entry point starts its compilation and does not wait for it: what a whole training step needs
//! is compiled on all cores while the step is recorded, and waited for when it is submitted.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use ::wgpu;

use super::cache::Cache;
use super::shader::{self, Binding};
use crate::backend::gpu::{Listed, Permutation, Scalar};

/// An entry point.
pub(super) struct Pipeline {
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) bindings: Vec<Binding>,
    pub(super) params: Vec<(String, Scalar)>,
    label: String,
    entry: &'static str,
    text: String,
    compiled: OnceLock<Result<wgpu::ComputePipeline, String>>,
}

impl Pipeline {
    /// The name of its permutation.
    pub(super) fn label(&self) -> &str {
        &self.label
    }
}

/// What compiles.
struct Compiler {
    device: wgpu::Device,
    /// With wgpu's checks of indices and loops.
    checked: bool,
    cache: Option<Cache>,
    /// Invocations of a subgroup, 0 if shaders do without.
    subgroup: AtomicU32,
}

impl Compiler {
    /// What makes of a text a pipeline's interface; quick.
    fn interface(&self, permutation: &Permutation, names: &[&str]) -> Result<Pipeline, String> {
        let module = shader::module(permutation, self.subgroup.load(Ordering::Relaxed) > 0)?;
        let mut bindings = module.bindings;
        bindings.retain(|binding| names.contains(&binding.name.as_str()));
        if let Some(unknown) = names.iter().find(|name| bindings.iter().all(|binding| binding.name != **name)) {
            return Err(format!("{permutation} has no buffer `{unknown}`"));
        }
        let entry = |binding, ty, has_dynamic_offset| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
            count: None,
        };
        let storage = |binding: &Binding| {
            entry(binding.number, wgpu::BufferBindingType::Storage { read_only: binding.read_only }, false)
        };
        let mut entries: Vec<wgpu::BindGroupLayoutEntry> = bindings.iter().map(storage).collect();
        if !module.params.is_empty() {
            entries.push(entry(0, wgpu::BufferBindingType::Uniform, true));
        }
        let label = permutation.to_string();
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let layout = self
            .device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries });
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(format!("{permutation}: {error}"));
        }
        Ok(Pipeline {
            layout,
            bindings,
            params: module.params,
            label,
            entry: permutation.entry,
            text: module.text,
            compiled: OnceLock::new(),
        })
    }

    /// The pipeline, compiled here if nobody else is at it.
    fn compiled<'a>(&self, pipeline: &'a Pipeline) -> &'a Result<wgpu::ComputePipeline, String> {
        pipeline.compiled.get_or_init(|| self.compile(pipeline))
    }

    fn compile(&self, pipeline: &Pipeline) -> Result<wgpu::ComputePipeline, String> {
        let label = Some(pipeline.label.as_str());
        let source = wgpu::ShaderSource::Wgsl(pipeline.text.as_str().into());
        let checks =
            if self.checked { wgpu::ShaderRuntimeChecks::checked() } else { wgpu::ShaderRuntimeChecks::unchecked() };
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        // SAFETY: the shaders are this crate's own. Every index they form is held to the shapes that `Checker` has
        // checked, their loops end, and they divide by nothing that can be 0; the conformance table is run with the
        // checks on too, where a difference would show.
        let shader =
            unsafe { self.device.create_shader_module_trusted(wgpu::ShaderModuleDescriptor { label, source }, checks) };
        let layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&pipeline.layout)],
            immediate_size: 0,
        });
        let subgroup = [("SUBGROUP", f64::from(self.subgroup.load(Ordering::Relaxed)))];
        let uses_subgroups = pipeline.text.contains("override SUBGROUP");
        let compiled = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&layout),
            module: &shader,
            entry_point: Some(pipeline.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: if uses_subgroups { &subgroup } else { &[] },
                zero_initialize_workgroup_memory: false,
            },
            cache: self.cache.as_ref().map(Cache::pipelines),
        });
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(format!("{}: {error}", pipeline.label));
        }
        if let Some(cache) = &self.cache {
            cache.grew();
        }
        Ok(compiled)
    }
}

/// All entry points that were asked for.
pub(super) struct Pipelines {
    compiler: Arc<Compiler>,
    known: RwLock<HashMap<Permutation, Arc<Pipeline>>>,
    listed: Vec<Listed>,
}

impl Pipelines {
    pub(super) fn new(device: wgpu::Device, checked: bool) -> Result<Self, String> {
        let cache = Cache::open(&device);
        let compiler = Arc::new(Compiler { device, checked, cache, subgroup: AtomicU32::new(0) });
        Ok(Self { compiler, known: RwLock::default(), listed: shader::listed()? })
    }

    /// Has the shaders that are compiled from now on use subgroups of so many invocations.
    pub(super) fn use_subgroups(&self, invocations: u32) {
        self.compiler.subgroup.store(invocations, Ordering::Relaxed);
    }

    /// How many invocations the subgroups have that shaders use; 0 if they do without.
    pub(super) fn subgroup(&self) -> u32 {
        self.compiler.subgroup.load(Ordering::Relaxed)
    }

    /// An entry point whose compilation has begun, for launches that bind what is named.
    pub(super) fn get<'a>(
        &self,
        permutation: &Permutation,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Arc<Pipeline>, String> {
        let found = self.known.read().unwrap_or_else(PoisonError::into_inner).get(permutation).cloned();
        if let Some(found) = found {
            return Ok(found);
        }
        if !self.listed.iter().any(|listed| listed.holds(permutation)) {
            return Err(format!("{permutation} is not among shaders/permutations"));
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get(permutation) {
            return Ok(found.clone());
        }
        let pipeline = Arc::new(self.compiler.interface(permutation, &names.collect::<Vec<_>>())?);
        known.insert(permutation.clone(), pipeline.clone());
        let (compiler, here) = (self.compiler.clone(), pipeline.clone());
        rayon::spawn(move || {
            // Whoever runs it reads the error.
            let _ = compiler.compiled(&here);
        });
        Ok(pipeline)
    }

    /// An entry point, when it is compiled.
    pub(super) fn wait<'a>(&self, pipeline: &'a Pipeline) -> Result<&'a wgpu::ComputePipeline, String> {
        self.compiler.compiled(pipeline).as_ref().map_err(String::clone)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.known.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Leaves what was compiled on disk for the next program, now and then.
    pub(super) fn save(&self) {
        if let Some(cache) = &self.compiler.cache {
            cache.save();
        }
    }
}
