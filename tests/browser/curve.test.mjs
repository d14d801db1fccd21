// The chart's arithmetic. Run with node --test; test_live.py does.
import assert from 'node:assert/strict';
import test from 'node:test';
import { before, fits, limits, merged, nearest, short, smoothed, ticks, whole } from '../../web/curve.mjs';

const run = whole({ run: 'a', step: 2, steps: 9, losses: [[1, 4], [2, 3]], rates: [[2, 0.1]] });

test('news that go on where the run is are added, and none twice', () => {
  const news = { run: 'a', step: 4, steps: 9, status: 'training', text: '', first: 1, losses: [[2, 3], [3, 2], [4, 1]], rates: [[4, 0.1]], validation: [{ step: 4, loss: 1 }] };
  assert.ok(fits(run, news));
  const after = merged(merged(run, news), news);
  assert.deepEqual(after.losses, [[1, 4], [2, 3], [3, 2], [4, 1]]);
  assert.equal(after.validation.length, 1);
});

test('news of another run, or with a gap before them, do not fit', () => {
  assert.ok(!fits(run, { run: 'b', first: 0 }));
  assert.ok(!fits(run, { run: 'a', first: 5 }));
  assert.ok(!fits(null, { run: 'a', first: 0 }));
  assert.ok(fits(run, { run: 'a' }), 'a text alone has no place');
  assert.ok(!fits(run, { run: 'a', first: 2, before: { validation: 1 } }), 'a measurement was missed while the page was loading');
  assert.ok(fits({ ...run, validation: [{ step: 2, loss: 1 }] }, { run: 'a', first: 2, before: { validation: 1, samples: 0 } }));
});

test('a very long curve is halved, and keeps its last point', () => {
  const long = merged({ ...run, losses: Array.from({ length: 4000 }, (_, i) => [i + 1, i]) }, { ...run, run: 'a', losses: [[4001, 7], [4002, 9]] });
  assert.equal(long.losses.length, 2001);
  assert.deepEqual(long.losses.at(-1), [4002, 8]);
});

test('the moving average starts at the first value and a constant stays what it is', () => {
  assert.deepEqual(smoothed([[1, 5], [2, 5], [3, 5]]).map(([, v]) => Number(v.toFixed(9))), [5, 5, 5]);
  assert.equal(smoothed([[1, 8], [2, 0]])[0][1], 8);
});

test('one wild step does not flatten the chart, and a constant has a range', () => {
  const [, high] = limits([...Array.from({ length: 200 }, () => 1), 1000]);
  assert.ok(high < 10, high);
  const [low, top] = limits([2, 2]);
  assert.ok(low < 2 && top > 2);
  assert.deepEqual(limits([]), [0, 1]);
});

test('a first measurement far above the losses is not cut off', () => {
  const losses = Array.from({ length: 200 }, () => 1);
  assert.ok(limits([...losses, 9], [9, 2])[1] > 9);
  const [low, high] = limits([], [3, 5]);
  assert.ok(low < 3 && high > 5);
});

test('ticks are round and inside', () => {
  assert.deepEqual(ticks(0, 100, 5), [0, 20, 40, 60, 80, 100]);
  assert.deepEqual(ticks(0.12, 0.31, 4).map(v => Number(v.toFixed(3))), [0.15, 0.2, 0.25, 0.3]);
});

test('what lies at a step is found', () => {
  const entries = [{ step: 0 }, { step: 10 }, { step: 20 }];
  assert.equal(before(entries, 19).step, 10);
  assert.equal(nearest(entries, 16).step, 20);
  assert.equal(before([], 3), null);
  assert.equal(nearest([], 3), null);
});

test('numbers are short', () => {
  assert.deepEqual([0.123456, 1e-5, 0, null].map(short), ['0.1235', '1.0e-5', '0', '-']);
});
