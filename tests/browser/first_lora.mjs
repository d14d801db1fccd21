// The bundled workflow as a person meets it. Prints one JSON object of what was seen; test_first_lora.py judges it.
//   CHROMIUM=... node first_lora.mjs <url> <plan.json> [--nodes2]
import fs from 'node:fs';
import { command, ended, fit, listen, missing, open, openTemplate, overlaps, press, set, tell, toApi } from './page.mjs';

const [url, file, ...flags] = process.argv.slice(2);
const plan = JSON.parse(fs.readFileSync(file));
const nodes2 = flags.includes('--nodes2');
const { browser, page, troubles, shot } = await open(url, { nodes2, shots: plan.shots });
const seen = { troubles };

/** Presses Run and waits until the Train node says that so many steps are done. */
async function start(widgets, steps) {
  await set(page, widgets);
  await listen(page);
  await press(page);
  const done = least => window.story.some(e => e.kind === 'progress_text' && Number(e.data.text.match(/step (\d+)\//)?.[1]) >= least);
  await page.waitForFunction(done, steps, { timeout: 180000 });
}

const line = () => page.evaluate(() => document.body.innerText.match(/step \d+\/\d+ · loss [\d.]+ · .+ left/)?.[0] ?? null);

async function look() {
  seen.card = await openTemplate(page, plan.pack, plan.workflow, shot);
  seen.missing = await missing(page);
  await fit(page);
  seen.overlaps = await overlaps(page);
  await shot('opened');
  seen.prompt = await toApi(page);
  seen.controls = await page.evaluate(() => Object.keys(LiteGraph.registered_node_types).filter(type => type.startsWith('Trainyard')).flatMap(
    type => (LiteGraph.createNode(type).widgets ?? []).filter(w => ['fixed', 'randomize', 'increment', 'decrement'].includes(w.value)).map(w => [type, w.value])));
}

async function train() {
  await start(plan.first, 20);
  seen.line = await line();
  await shot('running');
  seen.title = await page.title();
  seen.first = await ended(page);
  await page.waitForTimeout(1500);
  seen.plot = await page.evaluate(() => window.app.graph.nodes.find(n => n.type === 'TrainyardLossPlot').imgs?.map(i => [i.naturalWidth, i.naturalHeight]));
  seen.updates = await page.evaluate(() => {
    const at = window.story.filter(e => e.kind === 'progress_text' && /step/.test(e.data.text)).map(e => e.at);
    return { count: at.length, seconds: (at.at(-1) - at[0]) / 1000 };
  });
  seen.closing = await page.evaluate(() => document.body.innerText.match(/\d+ steps, loss .+|.+read back and equal/g));
  await shot('done');
}

async function interrupt() {
  await start(plan.second, 3);
  const begin = Date.now();
  await command(page, 'Comfy.Interrupt');
  seen.second = await ended(page);
  seen.milliseconds = Date.now() - begin;
  await page.waitForTimeout(800);
  await shot('interrupted');
}

async function help() {
  await page.evaluate(() => { const n = window.app.graph.nodes.find(x => x.type === 'TrainyardTrainLora'); window.app.canvas.selectNode(n); });
  await page.locator('[data-testid="info-button"], button:has(.icon-\\[lucide--info\\])').first().click();
  await page.waitForFunction(() => document.body.innerText.includes('Cancel, resume, run again'), null, { timeout: 15000 });
  await page.waitForTimeout(1200);
  seen.help = await page.evaluate(() => [...document.querySelectorAll('img')].filter(i => i.src.includes('/docs/')).map(i => i.naturalWidth));
  await shot('help');
}

await tell(seen, browser, async () => {
  await look();
  if (!nodes2) { await train(); await interrupt(); await help(); }
}, () => shot('error'));
