"""What a tool has given back: a text, parts of text, or any other JSON, of which the model is told the text."""

import json

# What has one of these types is a part of content, in any dialect; what has another one is the tool's own.
_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "image", "image_url", "input_image"})
_PARTS |= {"audio", "input_audio", "video", "file", "input_file", "document"}


def result_text(result: object) -> object:
    """The JSON text of a result that is neither text nor parts; text, parts and null come back as they are."""
    pieces = result if isinstance(result, list) else [result]
    if all(piece is None or isinstance(piece, str) for piece in pieces) or any(map(_is_part, pieces)):
        return result
    return json.dumps(result, ensure_ascii=False)


def _is_part(piece: object) -> bool:
    if not isinstance(piece, dict):
        return False
    kind = piece.get("type")
    return piece.keys() == {"text"} if kind is None else isinstance(kind, str) and kind in _PARTS
