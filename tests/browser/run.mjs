// Tries nearfar's shaders in headless Chromium's WebGPU. usage: node run.mjs FOLDER
//
// FOLDER holds what the test `export_for_the_browser` of src/backend/wgpu/browser.rs writes: shaders.json, every
// permutation of every shader, all of which the browser has to accept; and launches.json, one launch of many of them, with
// everything that is bound before and after, which have to come to the same under WebGPU's default limits.

import { createServer } from "node:http";
import { readFile, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { compileAll, repeatAll } from "./page.mjs";

const folder = process.argv[2];
if (!folder) {
    console.error("usage: node run.mjs FOLDER");
    process.exit(2);
}
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const shaders = JSON.parse(await readFile(join(folder, "shaders.json"), "utf8"));
const launches = JSON.parse(await readFile(join(folder, "launches.json"), "utf8"));

// WebGPU is there for pages of a secure origin, which localhost is.
const server = createServer((_, response) => response.end("<!doctype html><title>nearfar</title>"));
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const profile = await mkdtemp(join(tmpdir(), "nearfar-browser-"));
const context = await chromium.launchPersistentContext(profile, {
    executablePath,
    headless: true,
    args: [
        "--no-sandbox",
        "--enable-unsafe-webgpu",
        "--use-webgpu-adapter=swiftshader",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ],
});

let failures = [];
try {
    const page = await context.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    const started = Date.now();
    const seconds = () => ((Date.now() - started) / 1000).toFixed(1);

    // In parts, so that no message between here and the page is huge.
    const inParts = async (all, size, run) => {
        let done = 0;
        const skipped = [];
        for (let first = 0; first < all.length; first += size) {
            const result = await page.evaluate(run, all.slice(first, first + size));
            done += result.done;
            skipped.push(...result.skipped);
            failures.push(...result.failures);
        }
        return { done, skipped };
    };
    const compiled = await inParts(shaders, 50, compileAll);
    console.log(`${compiled.done} permutations are accepted, ${seconds()} s`);
    if (compiled.skipped.length > 0) {
        const features = [...new Set(compiled.skipped)].join(", ");
        console.log(`${compiled.skipped.length} need what this browser has not: ${features}`);
    }
    const texts = new Map(shaders.map((shader) => [shader.permutation, shader]));
    const withTexts = launches.map((launch) => ({ ...launch, ...texts.get(launch.permutation) }));
    const repeated = await inParts(withTexts, 10, repeatAll);
    console.log(`${repeated.done} launches gave what they give elsewhere, ${seconds()} s`);
    if (compiled.done === 0 || repeated.done === 0) {
        failures.push("nothing was compiled or nothing launched");
    }
    console.log(await page.evaluate(async () => {
        const { vendor, architecture, description } = (await navigator.gpu.requestAdapter()).info;
        return `${navigator.userAgent}; ${[vendor, architecture, description].filter(Boolean).join(" ")}`;
    }));
} finally {
    await context.close();
    server.close();
    await rm(profile, { recursive: true, force: true });
}
for (const failure of failures) {
    console.error(`\n${failure}`);
}
if (failures.length > 0) {
    console.error(`\n${failures.length} failures`);
    process.exit(1);
}
