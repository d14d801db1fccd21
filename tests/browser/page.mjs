// ComfyUI's real page in headless Chromium: open it, drive it, note everything that goes wrong in it.
import fs from 'node:fs';
import path from 'node:path';
import { chromium } from 'playwright-core';

const FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
               '--disable-component-update', '--disable-sync', '--no-first-run'];
const ENDED = ['execution_success', 'execution_error', 'execution_interrupted'];
const EVENTS = [...ENDED, 'execution_start', 'executing', 'executed', 'progress', 'progress_text'];

/** {browser, page, troubles, shot}: the page is ready for use; `troubles` fills with page errors and packs that did not load. */
export async function open(url, { nodes2 = false, shots = 'shots', viewport = { width: 1900, height: 1400 } } = {}) {
  await settings(url, { 'Comfy.TutorialCompleted': true, 'Comfy.InstalledVersion': '99.0.0', 'Comfy.VueNodes.Enabled': nodes2,
                        'Comfy.Workflow.ShowMissingModelsWarning': false });
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, headless: true, args: FLAGS });
  const page = await browser.newPage({ viewport });
  await page.addInitScript(kit);
  const troubles = watch(page);
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.graph && window.LiteGraph, null, { timeout: 90000 });
  await page.waitForTimeout(1000);
  fs.mkdirSync(shots, { recursive: true });
  const shot = name => page.screenshot({ path: path.join(shots, `${nodes2 ? 'nodes2' : 'classic'}_${name}.png`) });
  return { browser, page, troubles, shot };
}

/** Settings go in by REST before the page loads: a first visit opens a tutorial otherwise. */
export async function settings(url, values) {
  for (const [key, value] of Object.entries(values))
    await fetch(`${url}/api/settings/${key}`, { method: 'POST', body: JSON.stringify(value), headers: { 'Content-Type': 'application/json' } });
}

function watch(page) {
  const troubles = [];
  page.on('pageerror', error => troubles.push(`pageerror: ${String(error).slice(0, 400)}`));
  page.on('console', message => /Error loading extension/.test(message.text()) && troubles.push(message.text().slice(0, 400)));
  return troubles;
}

/** In the page: kit.add makes a node with these widgets, kit.link connects an output to a named input. */
function kit() {
  const add = (type, pos, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = pos;
    window.app.graph.add(node);
    for (const [key, value] of Object.entries(values)) node.widgets.find(w => w.name === key).value = value;
    return node;
  };
  window.kit = { add, link: (from, slot, to, input) => from.connect(slot, to, to.inputs.findIndex(i => i.name === input)) };
}

/** Does what a script is for and prints what was seen, in the last line, also where it failed: `failed` then takes a picture. */
export async function tell(seen, browser, act, failed = () => {}) {
  try {
    await act();
  } catch (error) {
    seen.error = String(error.stack ?? error).slice(0, 2000);
    await failed();
  } finally {
    await browser.close();
  }
  console.log(JSON.stringify(seen));
}

export const command = (page, id) => page.evaluate(name => window.app.extensionManager.command.execute(name), id);

/** Opens a template as a person does: Extensions, the pack, the card. Gives the width of the card's picture, 0 when it did not load. */
export async function openTemplate(page, pack, name, shot) {
  await command(page, 'Comfy.BrowseTemplates');
  const dialog = page.locator('[role=dialog]');
  await dialog.getByText(pack, { exact: true }).click({ timeout: 20000 });
  const card = dialog.getByText(name, { exact: true });
  await card.waitFor({ timeout: 20000 });
  await dialog.locator('img').first().waitFor({ timeout: 5000 }).catch(() => {});
  await page.waitForTimeout(500);
  await shot('templates');
  const widths = await dialog.locator('img').evaluateAll(all => all.map(picture => picture.naturalWidth));
  await card.click();
  await page.waitForFunction(() => window.app.graph.nodes.some(n => n.type.startsWith('Trainyard')), null, { timeout: 20000 });
  await page.waitForTimeout(1500);
  return widths[0] ?? 0;
}

/** Node types of the graph that the page does not know. */
export const missing = page => page.evaluate(() => window.app.graph.nodes.map(n => n.type).filter(type => !(type in LiteGraph.registered_node_types)));

/** Pairs of nodes whose rectangles, titles included, overlap. */
export const overlaps = page => page.evaluate(() => {
  const box = n => { const b = n.getBounding(); return [b[0], b[1], b[0] + b[2], b[1] + b[3]]; };
  const hit = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const all = window.app.graph.nodes;
  return all.flatMap((a, i) => all.slice(i + 1).filter(b => hit(box(a), box(b))).map(b => `${a.id} ${a.title} / ${b.id} ${b.title}`));
});

/** Sets widgets: {node type or title: {widget: value}}. */
export const set = (page, values) => page.evaluate(all => {
  for (const node of window.app.graph.nodes)
    for (const [name, value] of Object.entries({ ...all[node.type], ...all[node.title] })) {
      const widget = node.widgets.find(w => w.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
}, values);

export const toApi = page => page.evaluate(async () => (await window.app.graphToPrompt()).output);
export const fit = page => command(page, 'Comfy.Canvas.FitView').then(() => page.waitForTimeout(700));

/** Notes every message of the server from now on, with milliseconds. */
export const listen = page => page.evaluate(kinds => {
  if (!window.story) for (const kind of kinds) window.app.api.addEventListener(kind, e => window.story.push({ kind, data: e.detail, at: performance.now() }));
  window.story = [];
}, EVENTS);

export const press = async page => { await page.getByTestId('queue-button').click(); };
export const seen = (page, text, ms = 60000) => page.waitForFunction(t => document.body.innerText.includes(t), text, { timeout: ms });

/** Looks until `check` accepts what it sees, and gives what it saw last: on a busy machine the page is late, and whoever reads this judges. */
export async function eventually(page, look, check, ms = 15000) {
  for (const begin = Date.now(); ; await page.waitForTimeout(100)) {
    const found = await look();
    if (check(found) || Date.now() - begin > ms) return found;
  }
}

/** Looks until nothing has changed for half a second. */
export async function settled(page, look, ms = 15000) {
  let last = null;
  return eventually(page, async () => { await page.waitForTimeout(500); return look(); }, found => { const same = JSON.stringify(found) === last; last = JSON.stringify(found); return same; }, ms);
}

/** Waits for the last message of a run, and gives its kind. */
export async function ended(page, ms = 300000) {
  await page.waitForFunction(kinds => window.story.some(e => kinds.includes(e.kind)), ENDED, { timeout: ms });
  return page.evaluate(kinds => window.story.find(e => kinds.includes(e.kind)).kind, ENDED);
}
