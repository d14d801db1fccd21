// The caption grid as a person uses it. Prints one JSON object of what was seen; test_captions.py judges it.
//   CHROMIUM=... node captions.mjs <url> <plan.json> [--nodes2]
import fs from 'node:fs';
import { ended, eventually, listen, open, press, settled, tell } from './page.mjs';

const [url, file, ...flags] = process.argv.slice(2);
const plan = JSON.parse(fs.readFileSync(file));
const nodes2 = flags.includes('--nodes2');
const { browser, page, troubles, shot } = await open(url, { nodes2, shots: plan.shots });
const seen = { troubles };
const parts = plan.parts ?? ['edit', 'wheel', 'filter', 'revert', 'reload', 'many', 'subgraph', 'anew', 'light'];
const grid = '.trainyard-captions', area = `${grid} textarea`;

/** Load Dataset -> Edit Captions by Hand -> Caption Report and Edit Captions, at 100 % zoom. */
const build = folder => page.evaluate(async name => {
  await window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
  const { graph, canvas } = window.app;
  const add = (type, pos, size) => { const n = LiteGraph.createNode(type); n.pos = pos; graph.add(n); if (size) n.setSize(size); return n; };
  const load = add('TrainyardLoadDataset', [20, 60]), hand = add('TrainyardEditCaptionsByHand', [420, 60]), report = add('TrainyardCaptionReport', [1220, 60], [360, 420]);
  load.widgets.find(w => w.name === 'folder').value = name;
  const rules = add('TrainyardEditCaptions', [1220, 520], [360, 420]);
  rules.widgets.find(w => w.name === 'edits').value = 'only: number 3\ntrigger: sks';
  load.connect(0, hand, 0);
  hand.connect(0, report, 0);
  hand.connect(0, rules, 0);
  canvas.ds.scale = 1;
  canvas.ds.offset = [40, 80];
  canvas.setDirty(true, true);
  canvas.emitBeforeChange();
  canvas.emitAfterChange();
}, folder);

const hand = () => page.evaluate(() => {
  const all = graph => graph.nodes.flatMap(n => [n, ...(n.subgraph ? all(n.subgraph) : [])]);
  const node = all(window.app.rootGraph ?? window.app.graph).find(n => n.type === 'TrainyardEditCaptionsByHand');
  return { edits: node.widgets.find(w => w.name === 'edits').value, size: [...node.size], nodes: window.app.graph.nodes.length, scale: window.app.canvas.ds.scale,
           offset: [...window.app.canvas.ds.offset], saved: node.serialize().widgets_values };
});
const look = () => page.evaluate(root => {
  const all = s => [...document.querySelectorAll(`${root} ${s}`)];
  return { captions: all('textarea').map(a => a.value), changed: all('.card.changed').length, cards: all('.card').length,
           line: document.querySelector(`${root} .line`)?.textContent, empty: document.querySelector(`${root} .empty`)?.textContent ?? null,
           pictures: all('img').filter(i => i.complete && i.naturalWidth > 0).length, focus: document.activeElement.tagName };
}, grid);
const click = name => page.locator(`${grid} input[type=button][value="${name}"]:visible`).first().click();

const texts = () => page.evaluate(() => [...document.querySelectorAll('.trainyard-text')].map(e => e.innerText));
const looked = check => eventually(page, look, check);

async function run() {
  await listen(page);
  await press(page);
  const kind = await ended(page);
  return { kind, texts: await settled(page, texts) };
}

async function edit() {
  await build(plan.folder);
  await page.waitForSelector(grid);
  seen.before = await looked(now => now.empty !== null);
  await shot('captions_before');
  seen.first = await run();
  await page.waitForFunction(s => document.querySelectorAll(s).length > 0, `${grid} img`, { timeout: 20000 });
  seen.shown = await looked(now => now.pictures >= 6);
  seen.box = await page.evaluate(root => {
    const box = document.querySelector(root).getBoundingClientRect(), inside = [...document.querySelectorAll(`${root} .bar > *`)].filter(e => e.offsetParent);
    const rect = e => e.getBoundingClientRect(), hit = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    return { width: box.width, height: box.height, outside: inside.filter(e => rect(e).right > box.right + 1).length,
             overlaps: inside.flatMap((a, i) => inside.slice(i + 1).filter(b => hit(rect(a), rect(b)))).length };
  }, grid);
  await shot('captions_shown');

  await page.locator(area).nth(0).fill('a crimson star');
  await page.locator(area).nth(1).click();
  await page.keyboard.press('End');
  await page.keyboard.type(', on a mat');
  seen.typed = [await look(), await hand()];
  await page.locator(`${grid} input[placeholder=Find]`).fill('star');
  await page.locator(`${grid} input[placeholder="Replace with"]`).fill('circle');
  seen.found = (await look()).line;
  await click('Replace');
  seen.replaced = await look();
  await shot('captions_replaced');
  await page.keyboard.press('Control+z');
  seen.undone = [await looked(now => now.captions[0] === 'a crimson star'), await hand()];
  await page.keyboard.press('Control+Shift+Z');
  seen.redone = await look();
  await click('Undo');
  await page.keyboard.press('Control+z');
  seen.undone2 = [await looked(now => !now.captions[1].endsWith('mat')), await hand()];
  await click('Redo');
  await page.locator(`${grid} input[placeholder=Find]`).fill('');
  await page.locator(area).nth(0).focus();
  await page.keyboard.press('Enter');
  seen.entered = await page.evaluate(s => [...document.querySelectorAll(s)].indexOf(document.activeElement), area);
  seen.second = await run();
  seen.after = await look();
  seen.again = await run();
  seen.cached = await look();
  await shot('captions_after');
}

async function wheel() {
  const before = await hand(), box = await page.locator(`${grid} .cards`).boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
  await page.mouse.wheel(0, 200);
  const scrolled = await eventually(page, () => page.evaluate(s => document.querySelector(s).scrollTop, `${grid} .cards`), top => top > 0);
  const now = await hand();
  seen.wheel = { scrolled, still: before.scale === now.scale && `${before.offset}` === `${now.offset}` };
}

async function filter() {
  await page.locator(`${grid} input[type=search]`).fill('crimson');
  seen.filtered = await look();
  await page.locator(`${grid} input[type=search]`).fill('');
  await page.locator(`${grid} select`).selectOption('edited');
  seen.edited = await look();
  await page.locator(`${grid} select`).selectOption('without caption');
  seen.bare = await look();
  await page.locator(`${grid} select`).selectOption('all');
}

async function revert() {
  await page.locator(`${grid} .card.changed .head input`).first().click();
  seen.reverted = await look();
  await click('Revert all');
  seen.revertedAll = [await look(), await hand()];
  await click('Undo');
  await click('Undo');
}

async function reload() {
  await page.waitForTimeout(1500);
  await eventually(page, () => page.evaluate(() => [localStorage, sessionStorage].flatMap(s => Object.values(s)).some(text => text.includes('a crimson star'))), Boolean, 6000); // the page's own draft of the workflow
  await page.reload({ waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app?.graph?.nodes?.some(n => n.type === 'TrainyardEditCaptionsByHand'), null, { timeout: 60000 });
  seen.reloaded = [await looked(now => now.line?.includes('kept')), await hand()];
  await shot('captions_reloaded');
  seen.third = await run();
  seen.back = await looked(now => now.captions[0] === 'a crimson star');
}

async function many() {
  await build(plan.many);
  await page.waitForSelector(grid);
  seen.manyRun = await run();
  await page.waitForFunction(s => document.querySelectorAll(s).length > 0, `${grid} img`, { timeout: 60000 });
  await page.waitForTimeout(1000);
  const first = await look();
  const figures = await page.evaluate(async root => {
    const list = document.querySelector(`${root} .cards`), frames = [], begin = performance.now();
    for (let last = begin; performance.now() - begin < 6000;) {
      list.scrollTop += 400;
      await new Promise(requestAnimationFrame);
      const now = performance.now();
      frames.push(now - last);
      last = now;
      if (list.scrollTop + list.clientHeight >= list.scrollHeight - 2 && frames.length > 20) break;
    }
    frames.sort((a, b) => a - b);
    const area = document.querySelectorAll(`${root} textarea`)[3], at = performance.now();
    area.value = 'typed'; area.dispatchEvent(new Event('input'));
    return { median: frames[frames.length >> 1], worst: frames.at(-1), key: performance.now() - at, cards: document.querySelectorAll(`${root} .card`).length };
  }, grid);
  seen.many = { first: first.cards, line: first.line, ...figures };
  await shot('captions_many');
}

async function subgraph() {
  await build(plan.folder);
  await page.waitForSelector(grid);
  await page.evaluate(() => {
    const graph = window.app.graph, node = graph.nodes.find(n => n.type === 'TrainyardEditCaptionsByHand');
    const { node: outer } = graph.convertToSubgraph(new Set([node]));
    window.app.canvas.setGraph(outer.subgraph);
  });
  await page.waitForTimeout(1000);
  seen.nestedRun = await run();
  seen.nested = await looked(now => now.cards === 9);
  await page.evaluate(() => { const c = window.app.canvas; c.ds.scale = 1; c.ds.offset = [-200, 60]; c.setDirty(true, true); });
  await page.locator(area).nth(0).fill('inside a subgraph');
  await page.waitForTimeout(500);
  await shot('captions_subgraph');
  seen.nestedAgain = await run();
  await page.evaluate(() => window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph));
  seen.nestedReport = await eventually(page, async () => (await texts()).join('\n'), text => text.includes('inside a subgraph'));
}

/** The graph's own undo makes all nodes anew, and so does another tab: what was shown comes back with them. */
async function anew() {
  await build(plan.folder);
  await run();
  const original = (await looked(now => now.cards === 9)).captions[0];
  for (const text of ['before the undo', 'after it']) {
    await page.locator(area).nth(0).fill(text);
    await page.waitForTimeout(1500); // so that the graph's history has a step of its own for it
  }
  const undo = async caption => {
    await page.evaluate(() => { document.activeElement.blur(); window.app.canvas.canvas.focus(); });
    await page.keyboard.press('Control+z');
    return [await looked(now => now.cards === 9 && now.captions[0] === caption), await hand()];
  };
  seen.graphUndo = await undo('before the undo');
  seen.graphUndo2 = await undo(original);
  await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow'));
  await eventually(page, () => page.evaluate(() => window.app.graph.nodes.length), count => count === 0);
  await page.waitForTimeout(800);
  await page.evaluate(() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow'));
  seen.tab = await looked(now => now.cards === 9);
}

async function light() {
  await build(plan.folder);
  await page.evaluate(() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'light'));
  await run();
  await page.locator(area).nth(0).fill('in the light');
  await page.waitForTimeout(1000);
  await shot('captions_light');
  await page.evaluate(() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark'));
}

await tell(seen, browser, async () => {
  const all = { edit, wheel, filter, revert, reload, many, subgraph, anew, light };
  for (const part of parts) await all[part]();
}, () => shot('captions_error'));
