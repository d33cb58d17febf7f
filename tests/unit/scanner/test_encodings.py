"""Files in other encodings than UTF-8: the words are the same, and the original is recorded."""

from __future__ import annotations

import pytest

from services.scanner import text

JAPANESE = (
    "# これは日本語のコメントです。関数は面積を計算します\ndef area(w, h):\n    # 幅と高さを掛ける\n    return w * h\n"
)
RUSSIAN = "# Это русский комментарий, функция считает площадь\ndef area(w, h):\n    return w * h\n"
GERMAN = "# Die Fläche wird berechnet\ndef area(w, h):\n    return w * h  # Größe mal Höhe\n"


@pytest.mark.parametrize(
    ("content", "encoding", "recorded"),
    [
        (JAPANESE, "cp932", "cp932"),
        (JAPANESE, "euc-jp", "euc-jp"),
        (JAPANESE, "utf-16", "utf-16-le"),
        (RUSSIAN, "cp1251", "windows-1251"),
        (RUSSIAN, "koi8-r", "koi8-r"),
        ("# 这是中文注释 函数计算面积\ndef area(w, h):\n    return w * h\n", "gb18030", "gb18030"),
        ("# 這是中文註釋 函數計算面積\ndef area(w, h):\n    return w * h\n", "big5", "big5"),
        ("# 한국어 주석입니다 함수는 면적을 계산합니다\ndef area(w, h):\n    return w * h\n", "cp949", "cp949"),
        ("# Zażółć gęślą jaźń, funkcja oblicza pole prostokąta\ndef area(w, h): ...\n", "cp1250", "windows-1250"),
        (GERMAN, "cp1252", "cp1252"),
        ("/* © 2004 Jörg */\nint main(void) { return 0; }\n", "cp1252", "cp1252"),
        ("// Función para calcular el área\nint f() { return 0; } // año\n", "latin-1", "cp1252"),
        ("x = '\x81\x8d'  # no letter of any code page\n", "latin-1", "latin-1"),
        (RUSSIAN, "utf-8-sig", "utf-8"),
    ],
)
def test_the_text_is_the_same_in_every_encoding(content: str, encoding: str, recorded: str) -> None:
    found = text.decode(content.encode(encoding))
    assert (found.text, found.encoding) == (content, recorded)
