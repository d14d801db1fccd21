// Every bundled workflow as the page opens it. Prints one JSON object of what was seen; test_workflow_pages.py judges it.
//   CHROMIUM=... node workflows.mjs <url> <plan.json> [--nodes2]
import fs from 'node:fs';
import { fit, missing, open, overlaps, tell, toApi } from './page.mjs';

const [url, file, ...flags] = process.argv.slice(2);
const plan = JSON.parse(fs.readFileSync(file));
const { browser, page, troubles, shot } = await open(url, { nodes2: flags.includes('--nodes2'), shots: plan.shots, viewport: { width: 2200, height: 1300 } });
const seen = { troubles, opened: {}, older: {} };

const load = workflow => page.evaluate(data => window.app.loadGraphData(data), workflow).then(() => page.waitForTimeout(1200));
const widgets = () => page.evaluate(() => Object.fromEntries(window.app.graph.nodes.filter(n => n.type.startsWith('Trainyard')).map(
  n => [n.id, (n.widgets ?? []).filter(w => w.serialize !== false).map(w => [w.name, w.value])])));

/** Words of a node's widgets that reach beyond its right edge, and boxes of the page that lie over each other inside one node. */
const spilling = () => page.evaluate(() => [...document.querySelectorAll('[data-node-id]')].flatMap(node => {
  const right = node.getBoundingClientRect().right;
  return [...node.querySelectorAll('textarea, input, canvas, img')].filter(e => e.offsetParent && e.getBoundingClientRect().right > right + 2)
    .map(e => `${node.dataset.nodeId}: ${e.tagName}`);
}));

/** Nodes that the page made higher than they were saved, and so lie on what is below. */
const grown = () => page.evaluate(() => window.app.graph.nodes.filter(n => n.type.startsWith('Trainyard') && n.computeSize()[1] > n.size[1] + 1)
  .map(n => `${n.id} ${n.title}: ${Math.round(n.size[1])} < ${Math.round(n.computeSize()[1])}`));

await tell(seen, browser, async () => {
  for (const name of plan.workflows) {
    const workflow = await (await fetch(`${url}/api/workflow_templates/${plan.pack}/${name}.json`)).json();
    await load(workflow);
    await fit(page);
    seen.opened[name] = { missing: await missing(page), overlaps: await overlaps(page), spilling: await spilling(), grown: await grown(), prompt: await toApi(page) };
    await shot(name);
    if (flags.includes('--nodes2')) continue;
    const now = await widgets();
    for (const node of workflow.nodes) // as if it had been saved before the last input of each of our nodes was added
      if (node.type.startsWith('Trainyard') && (node.widgets_values ?? []).length > 1) node.widgets_values = node.widgets_values.slice(0, -1);
    await load(workflow);
    seen.older[name] = { now, then: await widgets() };
  }
}, () => shot('error'));
