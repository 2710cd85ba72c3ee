// Bundles the page into dist/, which the server embeds. Asset names carry a hash of their content, so that they may be cached for ever.
import { readFile, readdir, rm, writeFile } from "node:fs/promises";
import { basename } from "node:path";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const common = { bundle: true, target: ["chrome100", "firefox100", "safari15.4"], logLevel: "warning", legalComments: "eof" };

if (process.argv.includes("--test")) {
  await rm(".test", { recursive: true, force: true });
  const tests = (await readdir("test")).filter((name) => name.endsWith(".test.ts"));
  await build({ ...common, entryPoints: tests.map((name) => `test/${name}`), outdir: ".test", platform: "node", target: "node18", format: "esm", outExtension: { ".js": ".mjs" } });
} else {
  await rm("dist", { recursive: true, force: true });
  const result = await build({ ...common, entryPoints: ["src/main.ts"], outdir: "dist/assets", entryNames: "[name]-[hash]", format: "esm", minify: true, metafile: true });
  const asset = (extension) => {
    const found = Object.keys(result.metafile.outputs).find((path) => path.endsWith(extension));
    if (found === undefined) throw new Error(`the build made no ${extension} file`);
    return `/assets/${basename(found)}`;
  };
  const html = await readFile("src/index.html", "utf8");
  for (const path of Object.keys(result.metafile.outputs)) await writeFile(`${path}.gz`, gzipSync(await readFile(path), { level: 9 }));
  await writeFile("dist/index.html", html.replaceAll("{{script}}", asset(".js")).replaceAll("{{style}}", asset(".css")));
}
