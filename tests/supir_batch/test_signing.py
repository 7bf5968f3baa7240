"""Content credentials with a real chain of certificates: what is signed, what they say, and when they stop counting."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image
from typer.testing import CliRunner

from supir_batch import metadata, provenance, runlog, signing
from supir_batch.bookkeeping import Stopwatch
from supir_batch.cli import app
from supir_batch.decode import decode
from supir_batch.errors import ManifestError
from supir_batch.inspect import inspect
from supir_batch.runlog import RunLog
from supir_batch.settings import Manifest
from supir_batch.types import Job, Outcome, SigningKey
from supir_batch.verify import verify

c2pa = pytest.importorskip("c2pa")

Restore = Callable[..., Outcome]
FORMATS = {"a.jpg": "jpeg", "b.png": "png", "c.webp": "webp", "d.tif": "tiff", "e.jp2": "jpeg2000"}
GENERATIVE = {"engine": "supir", "engine_name": "SUPIR v0Q", "model_sha256": "ab" * 32, "weights": "v0Q"}
CURVE = ec.SECP256R1()


class Chain(NamedTuple):
    """Files of an institution that signs: its key, its certificates, and the root by which others trust it."""

    signing: SigningKey
    anchors: bytes


def certify(subject: str, key: Any, issuer: str, issuer_key: Any, **options: Any) -> x509.Certificate:
    """A certificate that is valid since yesterday for ``lasts``; ``ca`` says whether it may make others."""
    now, ca = datetime.datetime.now(datetime.UTC), bool(options.get("ca"))
    names = {
        name: x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Town archive"),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        for name in (subject, issuer)
    }  # fmt: skip
    usage = x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)
    builder = (
        x509.CertificateBuilder(names[issuer], names[subject], key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + options.get("lasts", datetime.timedelta(days=30)))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(usage, critical=True)
    )
    if not ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def make_chain(folder: Path, key: Any = None, **options: Any) -> Chain:
    """Root, intermediate and leaf; options are the leaf's."""
    folder.mkdir()
    root, between, leaf = (
        ec.generate_private_key(CURVE),
        ec.generate_private_key(CURVE),
        key or ec.generate_private_key(CURVE),
    )
    anchors = pem(certify("Root", root, "Root", root, ca=True))
    chain = certify("Leaf", leaf, "Between", between, **options), certify("Between", between, "Root", root, ca=True)
    (folder / "chain.pem").write_bytes(pem(*chain))
    private = leaf.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    (folder / "anchors.pem").write_bytes(anchors)
    return Chain(SigningKey(str(folder / "key.pem"), str(folder / "chain.pem")), anchors)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("keys") / "chain")


def photo(path: Path, rng: np.random.Generator) -> Path:
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def output(tmp_path: Path, restore: Restore, rng: np.random.Generator, chain: Chain) -> Path:
    """A signed output of every format, each twice as large as its source, with its log."""
    with RunLog(str(tmp_path / "out"), "run") as log:
        for name in FORMATS:
            outcome = restore(
                photo(tmp_path / name, rng), prompt="a fair", upscale=2.0, signed=True, signing=chain.signing,
                sidecars=("json", "premis"), **GENERATIVE,
            )  # fmt: skip
            assert outcome.status == "done", outcome.ticket.failure
            log.append(runlog.to_row(outcome, "run"))
    return tmp_path / "out"


def change_a_pixel(path: Path) -> None:
    """Change one bit of the coded pixels; in a JPEG they come last."""
    data = bytearray(path.read_bytes())
    data[-30 if path.suffix == ".jpg" else len(data) // 2] ^= 1
    path.write_bytes(data)


def problems(output: Path, anchors: bytes | None) -> list[tuple[str, str]]:
    found = [problem for checked in verify(str(output), anchors) for problem in checked.problems]
    return [(problem.uri.removeprefix(f"{output}/"), problem.kind) for problem in found]


def store_of(path: Path) -> dict[str, Any]:
    beside = Path(signing.credentials_uri(str(path)))
    kind = signing.MEDIA_TYPES[FORMATS[path.name]]
    with path.open("rb") as stream, c2pa.Reader(kind, stream, beside.read_bytes() if beside.exists() else None) as it:
        return dict(json.loads(it.json()))


# --- what is signed ------------------------------------------------------------------------------------------------


def test_every_format_is_signed_where_it_can_hold_it_and_trusted(output: Path, chain: Chain) -> None:
    assert sorted(path.name for path in output.glob("*.c2pa")) == ["d.tif.c2pa", "e.jp2.c2pa"]
    assert problems(output, chain.anchors) == []
    for name, kind in FORMATS.items():
        state = signing.beside(str(output / name), output / name, kind, chain.anchors)
        assert state == signing.State("Trusted", "Leaf, Town archive", ())


def test_the_credentials_say_what_was_done_to_what(output: Path, tmp_path: Path) -> None:
    for name in FORMATS:
        found = store_of(output / name)
        manifest = found["manifests"][found["active_manifest"]]
        assert manifest["title"] == name
        (original,) = manifest["ingredients"]
        assert (original["relationship"], original["title"]) == ("parentOf", name)
        source = json.loads((output / f"{name}.json").read_text())["source_sha256"]
        assert original["description"] == f"the original, SHA-256 {source}"
        assert "thumbnail" not in manifest
        assert "thumbnail" not in original
        (assertion,) = [one for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
        success = [one["code"] for one in found["validation_results"]["activeManifest"]["success"]]
        assert "assertion.dataHash.match" in success
        opened, edited, resized = assertion["data"]["actions"]
        assert [one["action"] for one in (opened, edited, resized)] == ["c2pa.opened", "c2pa.edited", "c2pa.resized"]
        assert len(opened["parameters"]["ingredients"]) == 1
        assert edited["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
        record = json.loads((output / f"{name}.json").read_text())
        assert edited["parameters"]["source_sha256"] == record["source_sha256"]
        assert edited["parameters"]["prompt"] == "a fair"
        assert "c2pa.created" not in json.dumps(found)


def test_an_image_of_the_same_size_is_not_called_resized(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, chain: Chain
) -> None:
    restore(photo(tmp_path / "a.jpg", rng), signed=True, signing=chain.signing)
    found = store_of(tmp_path / "out" / "a.jpg")
    (assertion,) = found["manifests"][found["active_manifest"]]["assertions"]
    assert [one["action"] for one in assertion["data"]["actions"]] == ["c2pa.opened", "c2pa.edited"]
    assert assertion["data"]["actions"][1]["digitalSourceType"].endswith("/algorithmicallyEnhanced")


def test_signing_changes_neither_pixels_nor_metadata(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, chain: Chain
) -> None:
    for name, kind in FORMATS.items():
        path = photo(tmp_path / name, rng)
        plain = Path(restore(path, folder="plain").output_uri)
        signed = Path(restore(path, folder="signed", signing=chain.signing).output_uri)
        with Image.open(plain) as one, Image.open(signed) as other:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        assert metadata.read_claims(signed) == metadata.read_claims(plain)
        assert (signed.read_bytes() == plain.read_bytes()) == (kind not in signing.EMBEDDED)


def test_record_premis_and_log_know_who_signed(output: Path) -> None:
    for row in runlog.read_log(str(output)).to_pylist():
        assert row["setting_signed"] is True
        assert bool(row["c2pa_sha256"]) == (row["source_format"] not in signing.EMBEDDED)
    record = json.loads((output / "a.jpg.json").read_text())
    assert (record["signature"]["common_name"], record["signature"]["issuer"]) == ("Leaf", "Town archive")
    xml = (output / "a.jpg.premis.xml").read_text()
    assert ">digital signature generation<" in xml
    assert "eventType/dsg" in xml
    assert "common_name Leaf" in xml


def test_credentials_of_an_earlier_output_do_not_stay(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, chain: Chain
) -> None:
    path = photo(tmp_path / "d.tif", rng)
    first = restore(path, signed=True, signing=chain.signing)
    beside = Path(signing.credentials_uri(first.output_uri))
    assert beside.exists()
    again = restore(path, signed=True, signing=chain.signing)
    assert (again.ticket.recovered, again.c2pa_sha256) == (True, first.c2pa_sha256)
    assert restore(path).c2pa_sha256 == ""
    assert not beside.exists()


def test_without_a_key_there_is_no_signature_and_the_log_says_so(
    tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    outcome = restore(photo(tmp_path / "a.png", rng))
    assert signing.read(Path(outcome.output_uri), "png", None, None) is None
    assert runlog.to_row(outcome, "run")["setting_signed"] is False
    assert json.loads(Path(outcome.output_uri + ".json").read_text())["signature"] is None


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "Ed25519", "RSA"],
)
def test_other_kinds_of_keys(tmp_path: Path, restore: Restore, rng: np.random.Generator, key: Any) -> None:
    other = make_chain(tmp_path / "keys", key)
    assert "signatures end" in signing.check(other.signing)
    outcome = restore(photo(tmp_path / "a.png", rng), signing=other.signing)
    state = signing.read(Path(outcome.output_uri), "png", None, other.anchors)
    assert state is not None
    assert state.state == "Trusted", state.reasons


def test_credentials_beside_a_giant_do_not_take_its_size_in_memory(
    tmp_path: Path, make_job: Callable[..., Job], rng: np.random.Generator, chain: Chain
) -> None:
    source, giant = photo(tmp_path / "d.tif", rng), tmp_path / "giant.tif"
    with giant.open("wb") as sink:
        sink.truncate(200_000_000)
    ticket = next(decode(make_job(source), 16)).ticket
    record = provenance.build_record(ticket, "tiff", 8)
    before = Stopwatch("nothing").record(ticket).records[-1].peak_memory_bytes
    watch = Stopwatch("signing")
    signed = signing.sign(giant, record, "giant.tif", source, chain.signing)
    assert watch.record(ticket).records[-1].peak_memory_bytes - before < 60_000_000
    state = signing.read(giant, "tiff", signed.credentials, chain.anchors)
    assert state is not None
    assert state.state == "Trusted", state.reasons


# --- when it stops counting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_one_changed_byte_breaks_it(output: Path, chain: Chain, name: str) -> None:
    change_a_pixel(output / name)
    found = problems(output, chain.anchors)
    assert (name, "signature") in found
    assert (name, "changed") in found
    state = signing.beside(str(output / name), output / name, FORMATS[name], chain.anchors)
    assert state is not None
    assert state.state == "Invalid"
    assert state.reasons


def test_a_signature_of_somebody_else_is_intact_but_not_trusted(output: Path, tmp_path: Path) -> None:
    others = make_chain(tmp_path / "others").anchors
    assert problems(output, None) == []
    assert problems(output, others) == [(name, "signature") for name in FORMATS]


def test_a_signature_that_was_taken_away_is_named(output: Path, chain: Chain) -> None:
    with Image.open(output / "b.png") as image:
        image.save(output / "b.png")
    (output / "d.tif.c2pa").unlink()
    found = problems(output, chain.anchors)
    assert ("b.png", "stripped") in found
    assert ("d.tif", "stripped") in found
    assert ("d.tif.c2pa", "missing") in found


def test_without_a_time_stamp_it_ends_with_the_certificate(
    tmp_path: Path, restore: Restore, rng: np.random.Generator
) -> None:
    brief = make_chain(tmp_path / "brief", lasts=datetime.timedelta(seconds=3))
    made = time.monotonic()
    path = Path(restore(photo(tmp_path / "a.jpg", rng), signing=brief.signing).output_uri)
    before = signing.read(path, "jpeg", None, brief.anchors)
    assert before is not None
    assert before.state == "Trusted"
    time.sleep(max(0.0, 4.5 - (time.monotonic() - made)))
    after = signing.read(path, "jpeg", None, brief.anchors)
    assert after is not None
    assert after.state == "Invalid"


# --- before a run, and while it goes -------------------------------------------------------------------------------


def test_a_good_key_is_warned_about_only_where_no_time_is_stamped(chain: Chain) -> None:
    until = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30)).date().isoformat()
    assert f"certificate on {until}" in signing.check(chain.signing)


def test_an_authority_that_does_not_answer_is_known_before_any_work(chain: Chain) -> None:
    with pytest.raises(ManifestError, match=r"127\.0\.0\.1:9"):
        signing.check(SigningKey(chain.signing.key, chain.signing.certificates, "http://127.0.0.1:9/"))


def test_keys_that_cannot_sign_are_known_before_any_work(tmp_path: Path, chain: Chain) -> None:
    other = make_chain(tmp_path / "other").signing
    expired = make_chain(tmp_path / "expired", lasts=datetime.timedelta(hours=-1)).signing
    (tmp_path / "text.pem").write_text("no key")
    (tmp_path / "p224.pem").write_bytes(
        ec.generate_private_key(ec.SECP224R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    for bad in (
        SigningKey(other.key, chain.signing.certificates),
        expired,
        SigningKey(str(tmp_path / "text.pem"), chain.signing.certificates),
        SigningKey(str(tmp_path / "p224.pem"), chain.signing.certificates),
        SigningKey(chain.signing.key, str(tmp_path / "text.pem")),
    ):
        with pytest.raises(ManifestError, match="signing: cannot sign with"):
            signing.check(bad)


def test_a_source_that_changed_meanwhile_is_not_signed_as_the_original(
    tmp_path: Path, restore: Restore, rng: np.random.Generator, chain: Chain
) -> None:
    path = photo(tmp_path / "a.png", rng)

    def change(pixels: Any) -> Any:
        Image.new("RGB", (40, 30)).save(path)
        return pixels

    outcome = restore(path, change=change, signing=chain.signing)
    assert outcome.ticket.failure is not None
    assert outcome.ticket.failure.kind == "changed"
    assert not (tmp_path / "out" / "a.png").exists()


def test_the_manifest_names_files_and_never_holds_a_key(tmp_path: Path) -> None:
    base = {"inputs": ["/p"], "output": {"uri": "/o"}}
    assert Manifest.model_validate(base).signing.files is None
    for bad, message in (
        ({"key": "/k"}, "go together"),
        ({"timestamp": "http://t"}, "only used with key"),
        ({"key": "-----BEGIN PRIVATE KEY-----\nsecret", "certificates": "/c"}, "name files"),
    ):
        (tmp_path / "m.yaml").write_text(json.dumps({**base, "signing": bad}))
        result = CliRunner().invoke(app, ["plan", str(tmp_path / "m.yaml")])
        assert (result.exit_code, message in result.stderr, "secret" in result.stderr) == (2, True, False)


def test_paths_count_from_the_manifest_and_the_environment_may_give_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.yaml").write_text("inputs: in\noutput: {uri: out}\nsigning: {key: k.pem, certificates: c.pem}\n")
    monkeypatch.setenv("SUPIR_BATCH__SIGNING__KEY", "/safe/key.pem")
    shown = CliRunner().invoke(app, ["show-config", str(tmp_path / "m.yaml")]).stdout
    assert 'signing.key = "/safe/key.pem"  # environment\n' in shown
    assert f'signing.certificates = "{tmp_path}/c.pem"  # manifest\n' in shown


def test_a_run_with_a_bad_key_does_nothing(tmp_path: Path, rng: np.random.Generator, chain: Chain) -> None:
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in" / "a.png", rng)
    (tmp_path / "key.pem").write_text("no key")
    (tmp_path / "m.yaml").write_text(
        f"inputs: in\noutput: {{uri: out}}\nengine: {{name: lanczos}}\n"
        f"signing: {{key: key.pem, certificates: {chain.signing.certificates}}}\n"
    )
    result = CliRunner().invoke(app, ["run", str(tmp_path / "m.yaml")])
    assert (result.exit_code, "error: signing: cannot sign with" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


# --- in words ------------------------------------------------------------------------------------------------------


def test_inspect_says_what_the_signature_is_worth(output: Path, tmp_path: Path, chain: Chain) -> None:
    others = make_chain(tmp_path / "others").anchors
    for name in ("a.jpg", "d.tif"):
        said = {
            anchors: dict(inspect(str(output / name), anchors))["signature"]
            for anchors in (None, chain.anchors, others)
        }
        assert said[None].startswith("intact, says to be by Leaf, Town archive; no anchors")
        assert said[chain.anchors] == "intact, by Leaf, Town archive, for whom the anchors vouch"
        assert said[others].endswith("do NOT vouch")
        change_a_pixel(output / name)
        assert dict(inspect(str(output / name)))["signature"].startswith("BROKEN: ")
    assert dict(inspect(str(tmp_path / "a.jpg")))["signature"] == "none"


def test_the_commands_take_anchors(output: Path, tmp_path: Path, chain: Chain) -> None:
    trusted = Path(chain.signing.key).with_name("anchors.pem")
    assert CliRunner().invoke(app, ["verify", str(output), "--anchors", str(trusted)]).exit_code == 0
    make_chain(tmp_path / "others")
    anchors = str(tmp_path / "others" / "anchors.pem")
    result = CliRunner().invoke(app, ["verify", str(output), "--anchors", anchors])
    assert (result.exit_code, result.stdout.count("signature  ")) == (6, len(FORMATS))
    shown = CliRunner().invoke(app, ["inspect", str(output / "a.jpg"), "--anchors", str(trusted)])
    assert "for whom the anchors vouch" in shown.stdout


def test_without_the_extra_it_says_what_to_install(output: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ManifestError, match=r"supir-batch\[c2pa\]"):
        signing.check(chain.signing)
    assert "supir-batch[c2pa]" in dict(inspect(str(output / "a.jpg")))["signature"]
    result = CliRunner().invoke(app, ["verify", str(output)])
    assert (result.exit_code, "supir-batch[c2pa]" in result.stderr) == (2, True)
