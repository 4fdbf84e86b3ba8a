// What runs in the page. Each function is handed over as its text, so that it can refer to nothing outside itself.

/** Makes modules of permutations. Returns how many, what others lack, and what went wrong. */
export async function compileAll(shaders) {
    globalThis.openDevice ??= (async () => {
        const adapter = await navigator.gpu.requestAdapter();
        if (!adapter) {
            throw new Error("the browser gives no WebGPU adapter");
        }
        const features = ["shader-f16", "subgroups"].filter((feature) => adapter.features.has(feature));
        return adapter.requestDevice({ requiredFeatures: features });
    })();
    const device = await globalThis.openDevice;
    const featureOf = { f16: "shader-f16", subgroups: "subgroups" };
    const result = { done: 0, skipped: [], failures: [] };
    await Promise.all(
        shaders.map(async ({ permutation, text }) => {
            const enabled = [...text.matchAll(/^enable ([^;]+);/gm)].flatMap((match) => match[1].split(/[\s,]+/));
            const missing = enabled.filter((name) => !device.features.has(featureOf[name] ?? name));
            if (missing.length > 0) {
                result.skipped.push(missing.join(" and "));
                return;
            }
            const module = device.createShaderModule({ code: text });
            const messages = (await module.getCompilationInfo()).messages.filter(({ type }) => type === "error");
            if (messages.length > 0) {
                const lines = text.split("\n");
                const shown = messages.map(({ lineNum, message }) => `  ${lineNum}: ${lines[lineNum - 1]}\n  ${message}`);
                result.failures.push(`${permutation} does not compile:\n${shown.join("\n")}`);
                return;
            }
            result.done += 1;
        }),
    );
    return result;
}

/** Repeats launches and compares what is in their buffers then with what is in them elsewhere. */
export async function repeatAll(launches) {
    const device = await globalThis.openDevice;
    const result = { done: 0, skipped: [], failures: [] };

    const filled = (words, usage) => {
        const buffer = device.createBuffer({ size: 4 * words.length, usage, mappedAtCreation: true });
        new Uint32Array(buffer.getMappedRange()).set(words);
        buffer.unmap();
        return buffer;
    };

    /** What is wrong with a buffer, if something is. */
    const difference = (name, element, found, expected) => {
        if (!element.includes("f32")) {
            // Some are the bits of numbers, which are larger than any count or place.
            const isNumber = (word) => word > 0x21000000 && word < 0x5e000000;
            const at = found.findIndex((word, i) => {
                const near = isNumber(word) && Math.abs(word - expected[i]) <= 4;
                return word !== expected[i] && !near;
            });
            return at < 0 ? null : `${name}[${at}] is ${found[at]}, not ${expected[at]}`;
        }
        const numbers = (words) => new Float32Array(Uint32Array.from(words).buffer);
        const [a, b] = [numbers(found), numbers(expected)];
        // The lowest numbers stand for nothing.
        const largest = b.reduce((largest, x) => (Math.abs(x) < 1e37 ? Math.max(largest, Math.abs(x)) : largest), 0);
        const at = a.findIndex((x, i) => {
            const same = found[i] === expected[i] || (Number.isNaN(x) && Number.isNaN(b[i]));
            return !same && !(Math.abs(x - b[i]) <= 1e-4 * Math.abs(b[i]) + 1e-5 * largest + 1e-37);
        });
        return at < 0 ? null : `${name}[${at}] is ${a[at]}, not ${b[at]}; the largest is ${largest}`;
    };

    for (const { permutation, entry, text, params, groups, bindings } of launches) {
        if (/^enable /m.test(text)) {
            continue;
        }
        device.pushErrorScope("validation");
        const { UNIFORM, STORAGE, COPY_SRC, COPY_DST, MAP_READ } = GPUBufferUsage;
        const visibility = GPUShaderStage.COMPUTE;
        const layout = [];
        const entries = [];
        const outputs = [];
        if (params) {
            layout.push({ binding: 0, visibility, buffer: { type: "uniform" } });
            entries.push({ binding: 0, resource: { buffer: filled(params, UNIFORM) } });
        }
        for (const { name, number, element, before, after } of bindings) {
            const type = after ? "storage" : "read-only-storage";
            const buffer = filled(before, STORAGE | COPY_SRC);
            layout.push({ binding: number, visibility, buffer: { type } });
            entries.push({ binding: number, resource: { buffer } });
            if (after) {
                const copy = device.createBuffer({ size: 4 * before.length, usage: MAP_READ | COPY_DST });
                outputs.push({ name, element, buffer, copy, after });
            }
        }
        const bindGroupLayout = device.createBindGroupLayout({ entries: layout });
        const pipeline = device.createComputePipeline({
            layout: device.createPipelineLayout({ bindGroupLayouts: [bindGroupLayout] }),
            compute: { module: device.createShaderModule({ code: text }), entryPoint: entry },
        });
        const encoder = device.createCommandEncoder();
        const pass = encoder.beginComputePass();
        pass.setPipeline(pipeline);
        pass.setBindGroup(0, device.createBindGroup({ layout: bindGroupLayout, entries }));
        pass.dispatchWorkgroups(...groups);
        pass.end();
        for (const { buffer, copy } of outputs) {
            encoder.copyBufferToBuffer(buffer, 0, copy, 0, copy.size);
        }
        device.queue.submit([encoder.finish()]);
        const error = await device.popErrorScope();
        if (error) {
            result.failures.push(`${permutation} cannot be launched: ${error.message}`);
            continue;
        }
        const wrong = [];
        for (const { name, element, copy, after } of outputs) {
            await copy.mapAsync(GPUMapMode.READ);
            const found = Array.from(new Uint32Array(copy.getMappedRange()));
            const unlike = difference(name, element, found, after);
            if (unlike) {
                wrong.push(unlike);
            }
            copy.destroy();
        }
        entries.forEach(({ resource }) => resource.buffer.destroy());
        if (wrong.length > 0) {
            result.failures.push(`${permutation} gives something else: ${wrong.join("; ")}`);
        } else {
            result.done += 1;
        }
    }
    return result;
}
