"""What is remembered of texts that were read, and for how long."""

from tightrope.backends.gguf.read_texts import ReadTexts


def test_what_was_used_last_stays() -> None:
    texts, read = ReadTexts(most_bytes=3 * (10 + 4)), list[bytes]()

    def token_ids(letter: bytes) -> list[int]:
        def read_it() -> list[int]:
            read.append(letter)
            return list(letter)

        return texts.token_ids(10 * letter, None, read_it)

    for letter in (b"a", b"b", b"c", b"a", b"d"):
        assert token_ids(letter) == list(letter)
    assert read == [b"a", b"b", b"c", b"d"]
    token_ids(b"a")
    token_ids(b"b")
    assert read == [b"a", b"b", b"c", b"d", b"b"]


def test_a_text_is_known_by_how_it_was_read() -> None:
    texts = ReadTexts()
    assert texts.token_ids(b"text", True, lambda: [1]) == [1]
    assert texts.token_ids(b"text", False, lambda: [2]) == [2]
    assert texts.token_ids(b"text", True, lambda: [3]) == [1]


def test_a_text_that_is_too_long_is_not_kept() -> None:
    texts = ReadTexts(most_bytes=8)
    assert texts.token_ids(b"a long text", None, lambda: [1]) == [1]
    assert texts.token_ids(b"a long text", None, lambda: [2]) == [2]
