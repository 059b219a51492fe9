import { createHash } from 'node:crypto';
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import react from '@vitejs/plugin-react';
import { defineConfig, type Plugin } from 'vite';

const here = import.meta.dirname;

/** Writes what the build was made from, so that a test can tell a stale dist/ without Node. */
function sources(): Plugin {
  return {
    name: 'sources',
    closeBundle() {
      const files = readdirSync(join(here, 'src'), { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile())
        .map((entry) => join(entry.parentPath, entry.name).slice(here.length + 1))
        .concat('package-lock.json', 'package.json', 'tsconfig.json', 'vite.config.ts')
        .sort();
      const hash = createHash('sha256');
      for (const file of files) hash.update(`${file}\n`).update(readFileSync(join(here, file)));
      writeFileSync(join(here, 'dist', 'sources.sha256'), `${hash.digest('hex')}\n`);
    },
  };
}

export default defineConfig({
  root: 'src',
  // relative addresses: the page also works behind a proxy that adds a prefix
  base: './',
  plugins: [react(), sources()],
  build: {
    outDir: resolve(here, 'dist'),
    emptyOutDir: true,
    assetsDir: 'assets',
    // the page's Content-Security-Policy allows files of its own origin, nothing inline
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    license: { fileName: 'LICENSES.md' },
    target: 'es2022',
  },
  server: { proxy: { '/v1': 'http://127.0.0.1:30000' } },
});
