// Train LoRA on a page in another language: its title, its labels, a tooltip; the sidebar of runs. Prints one JSON object; test_languages.py judges it.
//   CHROMIUM=... node languages.mjs <url> <plan.json> [--nodes2]
import fs from 'node:fs';
import { open, settings, tell } from './page.mjs';

const [url, file, ...flags] = process.argv.slice(2);
const plan = JSON.parse(fs.readFileSync(file));
const nodes2 = flags.includes('--nodes2');
const seen = {};

/** A Train LoRA alone in the graph, and every name on it. */
const add = page => page.evaluate(async () => {
  await window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
  const { graph, canvas } = window.app, node = LiteGraph.createNode('TrainyardTrainLora');
  node.pos = [400, 60];
  graph.add(node);
  Object.assign(canvas.ds, { scale: 1, offset: [70, 60] });
  canvas.setDirty(true, true);
  const named = all => Object.fromEntries(all.map(({ name, label, localized_name }) => [name, label ?? localized_name ?? name]));
  return { title: node.title, inputs: { ...named(node.inputs), ...named(node.widgets) }, outputs: named(node.outputs) };
});

/** The pointer rests on the widget `rank`. */
async function hover(page) {
  if (nodes2) return page.locator('[data-node-id]').getByText(plan.label, { exact: true }).first().hover();
  const at = await page.evaluate(() => {
    const { graph, canvas } = window.app, node = graph.nodes[0], box = canvas.canvas.getBoundingClientRect();
    const { scale, offset } = canvas.ds, rank = node.widgets.find(w => w.name === 'rank');
    return [box.left + (node.pos[0] + offset[0] + 60) * scale, box.top + (node.pos[1] + offset[1] + rank.last_y + 10) * scale];
  });
  await page.mouse.move(...at);
}

await settings(url, { 'Comfy.Locale': plan.language, 'LiteGraph.Node.TooltipDelay': 50 });
const { browser, page, troubles, shot } = await open(url, { nodes2, shots: plan.shots, viewport: { width: 1300, height: 900 } });
seen.troubles = troubles;
await tell(seen, browser, async () => {
  seen.node = await add(page);
  await page.waitForTimeout(1500);
  await hover(page);
  await page.getByText(plan.tooltip, { exact: true }).first().waitFor({ timeout: 10000 }).then(() => { seen.tooltip = true; }, () => { seen.tooltip = false; });
  await shot(`language_${plan.language}`);
  await page.locator('.trainyard-runs-tab-button').click();
  const runs = page.locator('.trainyard-runs');
  await runs.waitFor();
  seen.sidebar = { title: await runs.locator('header span').innerText(), again: await runs.locator('header button').innerText() };
  await shot(`language_${plan.language}_runs`);
});
await settings(url, { 'Comfy.Locale': 'en', 'LiteGraph.Node.TooltipDelay': 500 });
