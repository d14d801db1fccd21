// The live chart and the sidebar of runs as a person meets them. Prints one JSON object of what was seen; test_live.py judges it.
//   CHROMIUM=... node live.mjs <url> <plan.json> [--nodes2]
import fs from 'node:fs';
import { ended, eventually, listen, open, press, tell } from './page.mjs';

const [url, file, ...flags] = process.argv.slice(2);
const plan = JSON.parse(fs.readFileSync(file));
const nodes2 = flags.includes('--nodes2');
const { browser, page, troubles, shot: take } = await open(url, { nodes2, shots: plan.shots });
const seen = { troubles, unseen: [] };
const shot = name => take(name).catch(() => seen.unseen.push(name)); // a busy machine may be too slow for a picture; what is judged are the figures
const parts = plan.parts ?? ['train', 'reload', 'finish', 'again', 'sidebar', 'stop', 'subgraph', 'light'];
const name = part => `${nodes2 ? 'n' : 'c'}_${part}`;

/** Checkpoint, pictures and one Train node for each of the names, with Validation and Previews, at 100 % zoom. */
const build = (names, steps, rare = {}) => page.evaluate(async ([plan, names, steps]) => {
  await window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
  const { canvas } = window.app, { add, link } = window.kit;
  const model = add('CheckpointLoaderSimple', [20, 60], { ckpt_name: plan.checkpoint });
  const data = add('TrainyardLoadDataset', [20, 200], { folder: plan.folder });
  const encoded = add('TrainyardEncodeDataset', [440, 60], { resolution: 64, step: 8 });
  const look = add('TrainyardValidation', [20, 500], { every: plan.every, images: 2, levels: 4, name_worst: 2, preview_every: plan.preview, prompts: plan.prompts, sampling_steps: 4, guidance: 2.5 });
  link(data, 0, encoded, 'dataset');
  link(model, 1, encoded, 'clip');
  link(model, 2, encoded, 'vae');
  link(model, 1, look, 'clip');
  link(model, 2, look, 'vae');
  names.forEach((run, i) => {
    const train = add('TrainyardTrainLora', [820 + 420 * i, 60], { steps, learning_rate: 0.004, rank: 8, run_name: run });
    link(model, 0, train, 'model');
    link(encoded, 0, train, 'encoded');
    link(look, 0, train, 'validation');
  });
  canvas.ds.scale = 1;
  canvas.ds.offset = [70, 60];
  canvas.setDirty(true, true);
  canvas.emitBeforeChange();
  canvas.emitAfterChange();
}, [{ ...plan, ...rare }, names, steps]);

/** Every chart there is: what it says, and whether it fits its node and hides nothing. */
const charts = () => page.evaluate(() => [...document.querySelectorAll('.trainyard-run')].map(root => {
  const canvas = root.querySelector('canvas'), box = root.getBoundingClientRect(), image = root.querySelector('img');
  const pixels = canvas.width && canvas.height ? canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data : [];
  let ink = 0;
  for (let i = 3; i < pixels.length; i += 4) ink += pixels[i] > 0;
  const inner = [...root.querySelectorAll('.status, .plot, .legend, .sample')].filter(e => e.offsetHeight).map(e => e.getBoundingClientRect());
  return { ...root.dataset, text: root.querySelector('.status').textContent, said: !root.querySelector('.status').hidden, legend: root.querySelector('.legend').innerText, ink, width: box.width, height: box.height,
           picture: image?.complete ? image.naturalWidth : 0, plot: root.querySelector('.plot').clientHeight,
           outside: inner.filter(r => r.bottom > box.bottom + 1 || r.right > box.right + 1 || r.top < box.top - 1).length,
           overlaps: inner.filter((a, i) => inner.slice(i + 1).some(b => a.top < b.bottom - 1 && b.top < a.bottom - 1)).length };
}));

/** Widgets and the chart of every Train node, as boxes on the screen. */
const saved = () => page.evaluate(() => {
  const all = graph => graph.nodes.flatMap(n => [n, ...(n.subgraph ? all(n.subgraph) : [])]);
  return all(window.app.rootGraph ?? window.app.graph).filter(n => n.type === 'TrainyardTrainLora').map(n => {
    const [x, y] = n.pos, [w, h] = n.size;
    return { values: n.serialize().widgets_values.length, widgets: n.widgets.filter(one => one.serialize !== false).length, size: [w, h], pos: [x, y] };
  });
});

async function until(act, check, ms = 240000, what = 'something') {
  for (const begin = Date.now(); Date.now() - begin < ms;) {
    const found = await act();
    if (check(found)) return found;
    await page.waitForTimeout(250);
  }
  throw new Error(`${what} did not come within ${ms} ms: ${JSON.stringify(await act()).slice(0, 800)}`);
}

const at = step => all => all.some(chart => Number(chart.step) >= step && Number(chart.measured) > 0);

async function hover(index = 0, share = 0.6) {
  const box = await page.locator('.trainyard-run canvas').nth(index).boundingBox();
  await page.mouse.move(box.x + box.width * share, box.y + box.height * 0.4);
  await page.waitForTimeout(400);
}

async function train() {
  await build([name('one'), name('two')], plan.steps);
  await page.waitForTimeout(800);
  seen.before = { charts: (await charts()).length, saved: await saved() };
  await listen(page);
  await press(page);
  seen.running = await until(charts, at(plan.first), 300000, 'a chart');
  await shot('live_running');
  await hover();
  await shot('live_hover');
  await page.mouse.move(5, 700);
}

async function reload() {
  const workflow = await page.evaluate(() => window.app.graph.serialize());
  await page.reload({ waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.graph && window.LiteGraph, null, { timeout: 90000 });
  await page.waitForTimeout(1500);
  if (!(await page.evaluate(() => window.app.graph.nodes.some(n => n.type === 'TrainyardTrainLora')))) {
    seen.loadedAgain = true;
    await page.evaluate(w => window.app.loadGraphData(w), workflow);
  }
  await until(charts, all => all.length > 0, 60000, 'the chart after the reload');
  seen.reloaded = await eventually(page, charts, all => all.some(c => c.name === seen.running[0].name && Number(c.step) >= plan.first && c.points === c.step));
  await shot('live_reloaded');
}

async function finish() {
  seen.finished = await until(charts, all => all.length === 2 && all.every(c => c.status === 'finished' && Number(c.picture) > 0), 500000, 'the end of both runs');
  seen.finished = await eventually(page, charts, all => all.length === 2 && all.every(c => Number(c.points) === plan.steps && Number(c.measured) > plan.steps / plan.every));
  await page.evaluate(() => { const c = window.app.canvas; c.ds.scale = 1; c.ds.offset = [-300, 60]; c.setDirty(true, true); });
  await page.waitForTimeout(700);
  await hover(0, 0.8);
  await shot('live_finished');
  await page.mouse.move(5, 700);
  seen.saved = await saved();
  seen.prompt = await page.evaluate(async () => Object.values((await window.app.graphToPrompt()).output).filter(n => n.class_type === 'TrainyardTrainLora').map(n => 'run' in n.inputs));
}

/** Run again on an unchanged graph: nothing is trained, and the charts stay. */
async function again() {
  await listen(page);
  await press(page);
  seen.againKind = await ended(page);
  await page.waitForTimeout(800);
  seen.again = await eventually(page, charts, all => all.length === 2 && all.every(c => Number(c.points) === plan.steps));
}

const cards = () => page.evaluate(() => [...document.querySelectorAll('.trainyard-runs .card')].map(card => ({
  folder: card.dataset.folder, text: card.innerText, buttons: [...card.querySelectorAll('button')].map(b => b.textContent), picture: card.querySelector('img')?.naturalWidth ?? 0,
  wide: card.scrollWidth > card.clientWidth + 1, box: [card.getBoundingClientRect()].map(b => [b.left, b.top, b.right, b.bottom, innerHeight])[0],
  seen: card.contains(document.elementFromPoint(card.getBoundingClientRect().left + 12, card.getBoundingClientRect().bottom - 6)) })));
const tab = () => page.locator('.trainyard-runs-tab-button').click();
const card = run => page.locator('.trainyard-runs .card', { hasText: run }).first();

async function sidebar() {
  await tab();
  seen.cards = await until(cards, all => all.some(c => c.text.includes(name('one'))), 30000, 'the list of runs');
  await page.waitForTimeout(1000);
  await shot('runs_sidebar');
  await card(name('one')).getByText('Use LoRA').click();
  seen.used = await eventually(page, () => page.evaluate(() => window.app.graph.nodes.filter(n => n.type === 'TrainyardLoadLora').map(n => n.widgets[0].value)), all => all.length > 0);
  await shot('runs_used');
  await card(name('one')).getByText('Open workflow').click();
  await page.waitForTimeout(1000);
  const names = () => page.evaluate(() => window.app.graph.nodes.filter(n => n.type === 'TrainyardTrainLora').map(n => n.widgets.find(w => w.name === 'run_name').value));
  seen.opened = await eventually(page, async () => [await names(), await page.evaluate(() => window.app.graph.nodes.some(n => n.type === 'TrainyardLoadLora'))], ([all, old]) => all.length === 2 && !old).then(found => found[0]);
  seen.openedCharts = await eventually(page, charts, all => all.length === 2 && all.every(c => Number(c.points) === plan.steps), 30000);
  await card(name('two')).getByText('Delete').click();
  await page.waitForTimeout(1000);
  await shot('runs_delete');
  await page.getByRole('button', { name: 'Cancel' }).last().click();
  await page.waitForTimeout(600);
  seen.kept = (await cards()).some(c => c.text.includes(name('two')));
  await card(name('two')).getByText('Delete').click();
  await page.waitForTimeout(1000);
  await page.locator('[role=dialog], [role=alertdialog]').getByRole('button', { name: /delete|confirm/i }).last().click();
  seen.deleted = await until(cards, all => !all.some(c => c.text.includes(name('two'))), 30000, 'the deletion');
}

async function stop() {
  await build([name('long')], 100000, { every: 100, preview: 1000 });
  await listen(page);
  await press(page);
  await until(charts, at(3), 300000, 'the long run');
  const running = await until(cards, all => all.some(c => c.text.includes(name('long')) && c.text.includes('training')), 60000, 'the card of the long run');
  seen.busy = running.find(c => c.text.includes(name('long')));
  await shot('runs_training');
  await card(name('long')).getByText('Stop').click();
  seen.stopKind = await ended(page);
  const stopped = await until(cards, all => all.some(c => c.text.includes(name('long')) && c.text.includes('stopped')), 60000, 'the stopped card');
  seen.stopped = stopped.find(c => c.text.includes(name('long')));
  seen.stoppedChart = await charts();
  await listen(page);
  await card(name('long')).getByText('Resume').click();
  const step = Number(seen.stoppedChart[0].step);
  seen.resumed = await until(charts, all => all.some(c => c.name === name('long') && c.status === 'training' && Number(c.step) > step), 300000, 'the resumed run');
  await page.evaluate(() => window.app.api.interrupt(null));
  await ended(page);
  await tab();
}

async function subgraph() {
  await build([name('nested')], plan.steps);
  await page.evaluate(() => {
    const graph = window.app.graph, node = graph.nodes.find(n => n.type === 'TrainyardTrainLora');
    const { node: outer } = graph.convertToSubgraph(new Set([node]));
    window.app.canvas.setGraph(outer.subgraph);
    Object.assign(window.app.canvas.ds, { scale: 1, offset: [-300, 60] });
  });
  await page.waitForTimeout(1000);
  await listen(page);
  await press(page);
  seen.nestedKind = await ended(page);
  seen.nested = await until(charts, all => all.some(c => c.name === name('nested') && c.status === 'finished'), 30000, 'the chart in the subgraph');
  await page.evaluate(() => { const c = window.app.canvas; c.ds.scale = 1; const n = c.graph.nodes.find(x => x.type === 'TrainyardTrainLora'); c.ds.offset = [300 - n.pos[0], 80 - n.pos[1]]; c.setDirty(true, true); });
  await page.waitForTimeout(800);
  await shot('live_subgraph');
  await page.evaluate(() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph));
}

async function light() {
  await page.evaluate(() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'light'));
  await build([name('light')], plan.steps);
  await listen(page);
  await press(page);
  seen.lightKind = await ended(page);
  await page.waitForTimeout(1500);
  await hover(0, 0.5);
  await tab();
  await page.waitForTimeout(1200);
  await hover(0, 0.5);
  await shot('live_light');
  await page.evaluate(() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark'));
}

/** Train LECO-Score and Train LECO beside each other: losses may lie below zero, and looks at a score have no noise levels. */
async function scores() {
  await page.evaluate(async ([plan, names]) => {
    await window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
    const { canvas } = window.app, { add, link } = window.kit;
    const model = add('CheckpointLoaderSimple', [20, 60], { ckpt_name: plan.checkpoint });
    const judge = add('TrainyardLoadScoreModel', [20, 200], { file: plan.judge });
    const look = add('TrainyardValidation', [20, 340], { every: plan.every, images: 2, levels: 4, preview_every: plan.preview, prompts: plan.prompts, sampling_steps: 4, guidance: 2.5, width: 64, height: 64 });
    const held = add('TrainyardLecoScoreSettings', [420, 60], { sampling_steps: 4, ways: 1, guidance_scale: 1, watch_every: plan.every });
    const run = { resolution: 64, steps: plan.steps, learning_rate: 0.002 };
    const score = add('TrainyardTrainLecoScore', [820, 60], { ...run, prompts_text: 'a circle\na square', run_name: names[0] });
    const leco = add('TrainyardTrainLeco', [1260, 60], { ...run, target: 'a red circle', unconditional: 'a circle', run_name: names[1] });
    link(judge, 0, score, 'score_model');
    link(held, 0, score, 'settings');
    for (const [slot, input] of [[1, 'clip'], [2, 'vae']]) link(model, slot, look, input);
    for (const train of [score, leco]) {
      for (const [slot, input] of [[0, 'model'], [1, 'clip']]) link(model, slot, train, input);
      link(look, 0, train, 'validation');
    }
    canvas.ds.scale = 1;
    canvas.ds.offset = [-420, 60];
    canvas.setDirty(true, true);
  }, [plan, [name('score'), name('leco')]]);
  await page.waitForTimeout(800);
  await listen(page);
  await press(page);
  seen.scoresKind = await ended(page);
  seen.scores = await until(charts, all => all.length === 2 && all.every(c => c.status === 'finished' && Number(c.picture) > 0), 60000, 'both charts');
  seen.told = await page.evaluate(async () => {
    const told = [];
    for (const node of window.app.graph.nodes.filter(n => n.type.startsWith('TrainyardTrain')))
      told.push(await (await window.app.api.fetchApi(`/trainyard/runs/${node.id}?${new URLSearchParams({ workflow: String((window.app.rootGraph ?? window.app.graph).id) })}`)).json());
    return told;
  });
  for (const what of ['score', 'leco']) {
    await hover(seen.scores.findIndex(chart => chart.name === name(what)), 0.5);
    await shot(`live_${what}`);
  }
  await page.mouse.move(5, 700);
}

await tell(seen, browser, async () => {
  const all = { train, reload, finish, again, sidebar, stop, subgraph, light, scores };
  for (const part of parts) await all[part]();
}, () => shot('live_error'));
