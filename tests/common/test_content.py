"""Digests are those of version 0.1.0: prepared data, caches, held-out rows and runs rely on them."""

from llave_jax.common.content import digest, file_digest, short_hash
from llave_jax.data.rows import Row
from llave_jax.inputs.content import content_id, item_key
from llave_jax.inputs.item import Item

KEY = "04b8354d31905679b369ff4a62ba80129d054120c2fe91465df222b747801805"


def test_digests_do_not_change(tmp_path):
    assert short_hash(b"a/b.png").hex() == "7ea4fc4732436554"
    assert Row("what is this?", "a.png", "a cat", "", "", "").digest() == 18237612429750496117
    item = Item("<image> and <image>", (b"png", None))
    assert item_key(item).hex() == KEY
    assert content_id(item) == int.from_bytes(bytes.fromhex(KEY)[:4], "little", signed=True)
    assert content_id(None) == 0
    (tmp_path / "file").write_bytes(b"a dog")
    assert file_digest(tmp_path / "file") == digest(b"a dog") == digest(b"a ", b"dog")
