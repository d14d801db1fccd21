// The state of the caption grid without a page: `node --test caption_edits.test.mjs`, run by test_captions.py.
import assert from 'node:assert/strict';
import test from 'node:test';
import { Edits, matches, pattern, replacement, same } from '../../web/caption_edits.mjs';

const ball = { id: 'a', name: 'a.png', captions: ['red ball'] }, bare = { id: 'b', name: 'b.png', captions: [] };
const two = { id: 'c', name: 'c.png', captions: ['one', 'two'] };

function state(text = '') {
  const widget = { text, ms: 0 };
  return [new Edits(() => widget.text, written => { widget.text = written; }, () => widget.ms), widget];
}

test('an edit is one entry, and what equals the picture is none', () => {
  const [edits, widget] = state();
  edits.set([[ball, ['blue ball']]]);
  assert.deepEqual(JSON.parse(widget.text), { a: 'blue ball' });
  assert.equal(edits.changed(ball), true);
  edits.set([[ball, [' red ball ']], [bare, ['']]]);
  assert.equal(widget.text, '');
});

test('alternatives are a list', () => {
  const [edits, widget] = state();
  edits.set([[two, ['one', '2']]]);
  assert.deepEqual(JSON.parse(widget.text), { c: ['one', '2'] });
  assert.deepEqual(edits.of(two), ['one', '2']);
});

test('typing is one step of undo until a pause', () => {
  const [edits, widget] = state();
  for (const [at, text] of [[0, 'r'], [500, 're'], [900, 'red'], [5000, 'red b']]) {
    widget.ms = at;
    edits.set([[ball, [text]]], 'a/0');
  }
  assert.equal(edits.of(ball)[0], 'red b');
  edits.undo();
  assert.equal(edits.of(ball)[0], 'red');
  edits.undo();
  assert.equal(edits.of(ball)[0], 'red ball');
  assert.equal(edits.undo(), false);
  edits.redo();
  edits.redo();
  assert.equal(edits.of(ball)[0], 'red b');
});

test('replacing is one step for all pictures', () => {
  const [edits] = state();
  assert.equal(edits.replace([ball, bare, two], pattern('O'), replacement('$1')), 1);
  assert.deepEqual(edits.of(two), ['$1ne', 'tw$1']);
  edits.undo();
  assert.deepEqual(edits.of(two), ['one', 'two']);
  edits.replace([ball], pattern('(\\w+) ball', { regex: true }), replacement('$1 star', true));
  assert.deepEqual(edits.of(ball), ['red star']);
});

test('revert takes back one picture, or many in one step', () => {
  const [edits, widget] = state();
  edits.set([[ball, ['x']], [bare, ['y']]]);
  edits.revert([ball]);
  assert.deepEqual(JSON.parse(widget.text), { b: 'y' });
  edits.undo();
  edits.revert([ball, bare]);
  assert.equal(widget.text, '');
});

test('edits of pictures that are not there are left alone', () => {
  const [edits, widget] = state('{"gone": "kept"}');
  edits.set([[ball, ['x']]]);
  edits.revert([ball]);
  assert.deepEqual(JSON.parse(widget.text), { gone: 'kept' });
});

test('a text from elsewhere is taken over and begins a new history', () => {
  const [edits, widget] = state();
  edits.set([[ball, ['x']]]);
  widget.text = '{"b": "from the graph"}';
  assert.equal(edits.sync(), true);
  assert.equal(edits.undo(), false);
  assert.deepEqual(edits.of(bare), ['from the graph']);
  assert.equal(edits.sync(), false);
});

test('a text that is no JSON is told, and not overwritten before it is cleared', () => {
  for (const text of ['{', '[1]', 'null', '3']) {
    const [edits, widget] = state(text);
    assert.ok(edits.error, text);
    edits.set([[ball, ['x']]]);
    assert.equal(widget.text, text);
    edits.clear();
    assert.equal(widget.text, '');
  }
});

test('a picture is found by all words and not by a -word', () => {
  assert.ok(matches(ball, ['red ball'], 'A.PNG ball'));
  assert.ok(!matches(ball, ['red ball'], 'red -ball'));
  assert.ok(matches(ball, ['red ball'], ' -blue '));
});

test('a wrong pattern throws, and a literal one never does', () => {
  assert.throws(() => pattern('(', { regex: true }));
  assert.equal('a(b)'.replace(pattern('(b)'), 'c'), 'ac');
  assert.equal('Ab'.replace(pattern('a', { cased: true }), 'c'), 'Ab');
});

test('an absent caption is an empty one', () => {
  assert.ok(same([''], []));
  assert.ok(!same(['a'], []));
});
