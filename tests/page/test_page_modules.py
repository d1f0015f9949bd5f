"""The page's modules one by one, in Chromium: Markdown, chats, events, tokens, what fits the window."""

import json
from typing import Any

import pytest
from chat_page import chat_page
from playwright.sync_api import Browser, Page

Json = Any  # whatever a script returns


@pytest.fixture(scope="module")
def page(browser: Browser, server_url: str):
    with chat_page(browser, server_url) as visit:
        yield visit.page


def run(page: Page, module: str, script: str, argument: Json = None) -> Json:
    """The value of a script in which `m` is a module of the page, and `x` the argument."""
    return page.evaluate(f"async (x) => {{ const m = await import('/page/{module}.js'); {script} }}", argument)


def tree(node: dict[str, Any]) -> Json:
    """A node as nested lists: a tag and what is in it."""
    return node["text"] if "text" in node else [node["tag"], *map(tree, node["children"])]


def markdown(page: Page, source: str) -> list[Any]:
    return [tree(block) for block in run(page, "markdown/blocks", "return m.blocks(x)", source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain words", [["p", "plain words"]]),
        ("one\ntwo\n\nthree", [["p", "one\ntwo"], ["p", "three"]]),
        ("a *b* c", [["p", "a ", ["em", "b"], " c"]]),
        ("**b** and __c__", [["p", ["strong", "b"], " and ", ["strong", "c"]]]),
        ("***b***", [["p", ["strong", ["em", "b"]]]]),
        ("**bold *it***", [["p", ["strong", "bold ", ["em", "it"]]]]),
        ("*a **b***", [["p", ["em", "a ", ["strong", "b"]]]]),
        ("~~gone~~ ~kept~", [["p", ["del", "gone"], " ~kept~"]]),
        ("2 * 3 * 4 and snake_case_name", [["p", "2 * 3 * 4 and snake_case_name"]]),
        ("*never closed", [["p", "*", "never closed"]]),
        ("\\*no\\*", [["p", "*no", "*"]]),
        ("`a*b*` and ``c`d``", [["p", ["code", "a*b*"], " and ", ["code", "c`d"]]]),
        ("`open", [["p", "`open"]]),
        ("[a](https://b.c/d) e", [["p", ["a", "a"], " e"]]),
        ("see https://b.c/d.", [["p", "see ", ["a", "https://b.c/d"], "."]]),
        ("[a](javascript:x)", [["p", "[a](javascript:x)"]]),
        ("![a](https://b.c/d.png)", [["p", ["a", "a"]]]),
        ("# One\n## Two #", [["h2", "One"], ["h3", "Two #"]]),
        ("#no", [["p", "#no"]]),
        ("---", [["hr"]]),
        ("> a\n> b", [["blockquote", ["p", "a", "\n", "b"]]]),
        ("- a\n- b", [["ul", ["li", ["p", "a"]], ["li", ["p", "b"]]]]),
        ("2. a\n3. b", [["ol", ["li", ["p", "a"]], ["li", ["p", "b"]]]]),
        ("- a\n  - b\n- c", [["ul", ["li", ["p", "a"], ["ul", ["li", ["p", "b"]]]], ["li", ["p", "c"]]]]),
        ("text\n- a", [["p", "text"], ["ul", ["li", ["p", "a"]]]]),
        ("```py\na = 1\n\nb\n```\nc", [["pre", "a = 1\n", "\n", "b\n"], ["p", "c"]]),
        ("```\nstill being written", [["pre", "still being written\n"]]),
        (
            "| a | b |\n| --- | ---: |\n| 1 | *2* |",
            [
                [
                    "table",
                    ["thead", ["tr", ["th", "a"], ["th", "b"]]],
                    ["tbody", ["tr", ["td", "1"], ["td", ["em", "2"]]]],
                ]
            ],
        ),
        ("a | b", [["p", "a | b"]]),
        ("<b>x</b>", [["p", "<b>x</b>"]]),
    ],
)
def test_markdown_is_a_tree_of_these_elements(page: Page, source: str, expected: list[Any]):
    assert joined(markdown(page, source)) == joined(expected)


def joined(node: Json) -> Json:
    """Texts beside each other as one."""
    if isinstance(node, str):
        return node
    merged: list[Any] = []
    for child in map(joined, node):
        if isinstance(child, str) and len(merged) > 1 and isinstance(merged[-1], str):
            merged[-1] += child
        else:
            merged.append(child)
    return merged


PIECES = "# A *b*\n\n> q **w**\n> e\n\n1. x\n   - `y` z\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```js\nlet x;\n```\nlast [l](https://a.b)"


@pytest.mark.parametrize("end", range(0, len(PIECES) + 1, 3))
def test_each_letter_knows_where_it_stands_in_the_source(page: Page, end: int):
    source = PIECES[:end]

    def check(node: dict[str, Any]) -> None:
        if "text" in node:
            text = node["text"].removesuffix("\n")
            assert source[node["from"] : node["from"] + len(text)] == text
        for child in node.get("children", ()):
            check(child)

    for block in run(page, "markdown/blocks", "return m.blocks(x)", source):
        check(block)


def test_a_stream_drawn_piece_by_piece_is_what_the_whole_is(page: Page):
    script = """
      const draw = (texts) => {
        const element = document.createElement("div");
        for (const text of texts) m.showMarkdown(element, text, []);
        const shape = (node) => node.nodeType === 3 ? node.data : [node.tagName, ...[...node.childNodes].map(shape)];
        return JSON.stringify(shape(element));
      };
      return [draw([...x].map((_, place) => x.slice(0, place + 1))), draw([x])];
    """
    piecewise, whole = run(page, "markdown/build", script, PIECES)

    assert piecewise == whole


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_however_their_bytes_are_cut(page: Page, size: int):
    data = (
        ": read 1 of 2 tokens\n\n"
        + 'id: a.1\ndata: {"a": "é😀"}\n\ndata: x\ndata: y\n\n: ping\n\ndata: [DONE]\n\ndata: unfinished'
    )
    script = """
      const bytes = new TextEncoder().encode(x.data), reader = new m.EventReader(), found = [];
      for (let place = 0; place < bytes.length; place += x.size) {
        found.push(...reader.feed(bytes.subarray(place, place + x.size)));
      }
      return [found, reader.consumed];
    """
    found, consumed = run(page, "sse", script, {"data": data, "size": size})

    assert found == ['{"a": "é😀"}', "x\ny", "[DONE]"]
    assert consumed == len(data.removesuffix("data: unfinished").encode())


def tokens(*pieces: bytes) -> list[dict[str, Any]]:
    return [{"token": "?", "logprob": -0.5, "bytes": list(piece), "top_logprobs": []} for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "thought", "shown", "at", "expected"),
    [
        ([b"Hel", b"lo", b"<|end|>"], "", "Hello", 0, (0, ["Hel", "lo"])),
        (["é".encode()[:1], "é".encode()[1:], b"x"], "", "éx", 3, (3, ["é", "x"])),
        ([b"<think>", b"hm", b"</think>", b"\n\n", b"Yes"], "hm", "Yes", 0, (0, ["Yes"])),
        ([b" So", b" on"], "", "So on", 0, (2, [" on"])),
        ([b"other"], "", "text", 0, None),
        ([b"ab", b"cd"], "", "abc", 0, (0, ["ab"])),
    ],
)
def test_tokens_are_laid_on_the_words_that_are_shown(
    page: Page, pieces: list[bytes], thought: str, shown: str, at: int, expected: tuple[int, list[str]] | None
):
    script = "const all = new m.Gatherer(); all.add(x.tokens); return all.run(x.thought, x.shown, x.at)"
    argument = {"tokens": tokens(*pieces), "thought": thought, "shown": shown, "at": at}
    found = run(page, "tokens", script, argument)

    assert (found and (found["at"], [token[0] for token in found["tokens"]])) == expected


TURNS = [
    {"role": role, "text": role, "id": number}
    for number, role in enumerate(("assistant", *("user", "assistant") * 4), 1)
]


@pytest.mark.parametrize(("room", "first"), [(1000, 1), (90, 1), (89, 2), (80, 2), (79, 4), (20, 8), (5, 8)])
def test_as_few_of_the_oldest_turns_go_as_it_takes(page: Page, room: int, first: int):
    script = "return m.fitting(x.turns, x.room, async (turns) => 10 * turns.length)"

    assert run(page, "fit", script, {"turns": TURNS, "room": room})[0]["id"] == first


def test_what_surely_fits_is_not_counted(page: Page):
    usage = {"prompt": 500, "written": 100, "cached": 0, "moved": 0, "window": 1000}
    turns = [
        {"role": "user", "text": "a"},
        {"role": "assistant", "text": "b", "usage": usage},
        {"role": "user", "text": "c" * 50},
    ]
    script = "return m.surelyFits(x.turns, '', x.room)"

    assert run(page, "fit", script, {"turns": turns, "room": 700}) is True
    assert run(page, "fit", script, {"turns": turns, "room": 640}) is False
    usage["isCut"] = True
    assert run(page, "fit", script, {"turns": turns, "room": 10_000}) is False


def test_a_branch_goes_with_all_that_stands_behind_it(page: Page):
    script = """
      const chat = m.newChat();
      const ask = m.addTurn(chat, 0, "user", "ask");
      const first = m.addTurn(chat, ask.id, "assistant", "first");
      m.addTurn(chat, first.id, "user", "more");
      const second = m.addTurn(chat, ask.id, "assistant", "second");
      const seen = () => m.path(chat).map(({ text }) => text).join(" ");
      const found = [seen()];
      m.choose(chat, first);
      found.push(seen());
      m.removeTurn(chat, first);
      found.push(seen(), m.siblings(chat, second).length, chat.turns.length, chat.title);
      return found;
    """

    assert run(page, "chat", script) == ["ask second", "ask first more", "ask second", 1, 2, "ask"]


def test_an_edit_keeps_the_tokens_before_it(page: Page):
    script = """
      const chat = m.newChat();
      const turn = m.addTurn(chat, 0, "assistant", "one two three");
      turn.usage = {};
      turn.odds = [{ at: 0, tokens: [["one", 0, []], [" two", 0, []], [" three", 0, []]] }];
      m.rewrite(chat, turn, "one twenty");
      return [turn.odds[0].tokens.length, turn.usage === undefined];
    """

    assert run(page, "chat", script) == [1, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "none of this page's"),
        ('{"format": "tightrope chats 1"}', "none of this page's"),
        ({"turns": [{"id": 1, "parent": 7, "role": "user"}]}, "don't follow"),
        ({"turns": [{"id": 1, "parent": 0, "role": "user"}, {"id": 1, "parent": 0, "role": "user"}]}, "don't follow"),
        ({"turns": [{"id": 1, "parent": 1, "role": "user"}]}, "don't follow"),
        ({"turns": [{"id": "x", "parent": 0, "role": "user"}]}, "no place"),
        ({"turns": [{"id": 1, "parent": 0, "role": "system"}]}, "nobody's"),
    ],
)
def test_a_file_that_is_no_export_is_refused(page: Page, text: str | dict[str, Any], said: str):
    file = text if isinstance(text, str) else json.dumps({"format": "tightrope chats 1", "chats": [text]})
    script = "try { m.imported(x); return '' } catch (error) { return error.message }"

    assert said in run(page, "transfer", script, file)


def test_what_a_file_holds_beside_a_chat_is_left_out(page: Page):
    turn = {"id": 1, "parent": 0, "role": "user", "text": 7, "stream": {"id": "x", "from": 0}, "odds": [1, {"at": 0}]}
    chat = {
        "id": "mine",
        "title": "t",
        "turns": [turn],
        "chosen": {"0": 1, "5": 1, "__proto__": 1},
        "__proto__": {"x": 1},
    }
    file = json.dumps({"format": "tightrope chats 1", "chats": [chat]})
    (found,) = run(page, "transfer", "return m.imported(x)", file)

    assert found.pop("id") != "mine"
    assert found.pop("changed") > 0
    assert found == {
        "title": "t",
        "system": "",
        "chosen": {"0": 1},
        "turns": [{"id": 1, "parent": 0, "role": "user", "text": "", "odds": []}],
    }
