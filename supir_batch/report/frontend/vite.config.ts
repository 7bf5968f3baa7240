// Builds ../assets: one classic script and one style sheet, because a page opened from a disk may load no modules.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";

const ASSETS = join(import.meta.dirname, "..", "assets");
const SOURCES = ["package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "public", "src"];

const LICENSED = {
  Preact: "preact/LICENSE",
  OpenSeadragon: "openseadragon/LICENSE.txt",
  "Source Serif 4": "@fontsource/source-serif-4/LICENSE",
};

function filesOf(name: string): string[] {
  try {
    return readdirSync(join(import.meta.dirname, name)).flatMap((inner) => filesOf(`${name}/${inner}`));
  } catch {
    return [name];
  }
}

const sha256 = (path: string) => createHash("sha256").update(readFileSync(path)).digest("hex");

/** The licenses of what is in the bundle, and the hashes of sources and results, as `sha256sum --check` reads them. */
function told(): Plugin {
  return {
    name: "told",
    closeBundle() {
      const texts = Object.entries(LICENSED).map(
        ([name, file]) => `${name}\n\n${readFileSync(join(import.meta.dirname, "node_modules", file), "utf8").trim()}\n`,
      );
      writeFileSync(join(ASSETS, "licenses.txt"), texts.join(`\n${"-".repeat(80)}\n\n`));
      const sources = SOURCES.flatMap(filesOf).map((name) => `${sha256(join(import.meta.dirname, name))}  ../frontend/${name}`);
      const built = readdirSync(ASSETS)
        .filter((name) => !name.endsWith(".sha256"))
        .map((name) => `${sha256(join(ASSETS, name))}  ${name}`);
      writeFileSync(join(ASSETS, "build.sha256"), [...sources, ...built].sort((a, b) => (a.slice(66) < b.slice(66) ? -1 : 1)).join("\n") + "\n");
    },
  };
}

export default defineConfig({
  base: "./",
  plugins: [told()],
  build: {
    outDir: ASSETS,
    emptyOutDir: true,
    assetsInlineLimit: (file) => (file.endsWith(".woff2") ? true : undefined),
    cssCodeSplit: false,
    modulePreload: false,
    chunkSizeWarningLimit: 1000,
    rollupOptions: {
      input: "src/main.tsx",
      output: { format: "iife", name: "supirReportPage", entryFileNames: "report.js", assetFileNames: "report[extname]" },
    },
  },
});
