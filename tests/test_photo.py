"""Photographs from outside: varieties of files that other programs write, judged by Pillow and tifffile."""
import re
import struct
import time
import tracemalloc
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from PIL import Image, IptcImagePlugin, PngImagePlugin, TiffImagePlugin
from skimage.color import rgb2lab

import autohdr.photo as ph
from autohdr.photo import Photo, PhotoError, read_photo, read_size, resize, write_photo

REAL = Path(__file__).parents[2] / "shared" / "data" / "photos"
P3 = imagecodecs.cms_profile("rgb", whitepoint=(0.3127, 0.3290), primaries=(0.68, 0.32, 0.265, 0.69, 0.15, 0.06), gamma=2.2)
PROPHOTO = imagecodecs.cms_profile("rgb", whitepoint=(0.3457, 0.3585), primaries=(0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001), gamma=1.8)


@pytest.fixture
def picture():
    "A smooth colourful 8-bit picture, 60 x 80."
    return cv2.resize(np.random.default_rng(0).integers(30, 226, (4, 5, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_LINEAR)


def camera_exif(orientation=1, maker_note=b"MAKER" * 20):
    exif = Image.Exif()
    exif[271], exif[306], exif[315], exif[274] = "Maker", "2024:05:06 07:08:09", "A. Photographer", orientation
    exif.get_ifd(0x8769).update({33434: 0.008, 37500: maker_note, 40962: 80, 40963: 60, 36867: "2024:05:06 07:08:09"})
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 30.0, 15.5)})
    return exif


# ---- EXIF

@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif"])
def test_exif_survives_every_change_of_format(tmp_path, picture, suffix, target):
    source = tmp_path / f"in.{suffix}"
    Image.fromarray(picture).save(source, exif=camera_exif(6).tobytes())
    photo = read_photo(source)
    assert photo.pixels.shape == (80, 60, 3) and read_size(source) == (80, 60)
    out = write_photo(tmp_path / f"out.{target}", photo)
    with Image.open(out) as image:
        image.load()
        exif = image.getexif()
    assert image.size == (60, 80)
    assert exif[271] == "Maker" and exif[315] == "A. Photographer" and exif.get(274, 1) == 1
    sub, gps = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert sub[33434] == pytest.approx(0.008) and sub[36867] == "2024:05:06 07:08:09"
    assert gps[1] == "N" and [float(x) for x in gps[2]] == [52.0, 30.0, 15.5]
    if 40962 in sub: assert (sub[40962], sub[40963]) == (60, 80), "the size in EXIF must follow the turn"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_every_orientation_is_applied_once(tmp_path, picture, orientation, suffix):
    upright = Image.fromarray(picture)
    exif = Image.Exif()
    exif[274] = orientation
    upright.save(tmp_path / f"in.{suffix}", exif=exif)
    from PIL import ImageOps
    with Image.open(tmp_path / f"in.{suffix}") as image: expected = np.asarray(ImageOps.exif_transpose(image))
    photo = read_photo(tmp_path / f"in.{suffix}")
    assert np.abs(photo.pixels * 255 - expected).max() < 4
    again = read_photo(write_photo(tmp_path / f"out.{suffix}", photo))
    assert np.abs(again.pixels * 255 - expected).max() < 8


def with_thumbnail(thumbnail, byteorder="<"):
    "An EXIF block by hand: orientation 8, and a second directory with a thumbnail."
    e = byteorder
    first = struct.pack(e + "H", 1) + struct.pack(e + "HHIHH", 274, 3, 1, 8, 0) + struct.pack(e + "I", 26)
    second = struct.pack(e + "H", 2) + struct.pack(e + "HHII", 513, 4, 1, 56) + struct.pack(e + "HHII", 514, 4, 1, len(thumbnail)) + bytes(4)
    return (b"II*\0" if e == "<" else b"MM\0*") + struct.pack(e + "I", 8) + first + second + thumbnail


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_stale_thumbnail_is_dropped(tmp_path, picture, byteorder, suffix):
    thumbnail = imagecodecs.jpeg8_encode(picture[:8, :8], 50)
    block = with_thumbnail(thumbnail, byteorder)
    Image.fromarray(picture).save(tmp_path / f"in.{suffix}", exif=b"Exif\0\0" + block)
    assert thumbnail in (tmp_path / f"in.{suffix}").read_bytes()
    out = write_photo(tmp_path / f"out.{suffix}", read_photo(tmp_path / f"in.{suffix}"))
    assert thumbnail not in out.read_bytes()
    with Image.open(out) as image: assert not image.getexif().get_ifd(1)
    assert read_size(out) == (80, 60)


def test_maker_notes_stay_where_they_are(tmp_path, picture):
    block = camera_exif(maker_note=b"\x01\x02secret" * 9).tobytes()
    Image.fromarray(picture).save(tmp_path / "in.jpg", exif=block)
    read = read_photo(tmp_path / "in.jpg").exif
    assert len(read) == len(block) - 6 and read.index(b"secret") == block.index(b"secret") - 6


def test_exif_too_large_for_a_jpeg_loses_only_its_maker_notes(tmp_path, picture):
    photo = Photo(picture / np.float32(255), exif=camera_exif(maker_note=bytes(70_000)).tobytes()[6:])
    with pytest.warns(UserWarning, match="out.jpg.*maker notes"): out = write_photo(tmp_path / "out.jpg", photo)
    with Image.open(out) as image: assert image.getexif()[271] == "Maker"


def test_damaged_exif_and_profile_do_not_stop_a_photo(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1\2", icc_profile=b"no profile at all" * 20)
    with pytest.warns(UserWarning, match="a.jpg") as caught: photo = read_photo(tmp_path / "a.jpg")
    assert len(caught) == 2 and (photo.exif, photo.icc) == (b"", b"")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_sub_directory_of_exif_does_not_stop_the_writing(tmp_path, picture):
    exif = bytearray(camera_exif().tobytes()[6:])
    at = next(at for tag, _, at in ph._entries(exif, ph._get(exif, 4)) if tag == 0x8769)
    ph._put(exif, ph._get(exif, at + 8), 60_000, 3)  # so many entries
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    photo = read_photo(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="out.jpg.*EXIF"): assert read_photo(write_photo(tmp_path / "out.jpg", photo)).exif == b""


def test_tiff_keeps_resolution_and_any_script(tmp_path, picture):
    exif = Image.Exif()
    exif[282], exif[283], exif[296], exif[315] = 300.0, 300.0, 2, "José Ångström".encode()
    out = write_photo(tmp_path / "a.tif", Photo(picture / np.float32(255), exif=exif.tobytes()[6:]))
    with tifffile.TiffFile(out) as tif:
        assert tif.pages[0].tags[282].value == (300, 1) and tif.pages[0].tags[315].value == "José Ångström"
    with Image.open(write_photo(tmp_path / "b.jpg", read_photo(out))) as image:
        assert image.getexif()[315].encode("latin-1").decode() == "José Ångström" and image.getexif()[282] == 300


# ---- XMP, IPTC, comments and resolution

IPTC = b"\x1c\2\x05\0\7Kitchen\x1c\2\x19\0\4bath"


def editor_xmp(attributes='t:Orientation="6" exif:PixelXDimension="80"', inside="", filler=0):
    "An XMP packet with stale facts, under an unusual prefix, as attributes and as elements."
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:t="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:xmpGImg="http://ns.adobe.com/xap/1.0/g/img/" xmlns:dc="http://purl.org/dc/elements/1.1/" xmp:Rating="4" {attributes}>{inside}
<dc:title><rdf:Alt><rdf:li xml:lang="x-default">Küche &amp; Bad{"." * filler}</rdf:li></rdf:Alt></dc:title></rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>""".encode()


ELEMENTS = ("<t:Orientation>6</t:Orientation><t:ImageWidth>80</t:ImageWidth><xmp:Thumbnails><rdf:Alt><rdf:li rdf:parseType='Resource'>"
            "<xmpGImg:image>OLDPICTURE</xmpGImg:image></rdf:li></rdf:Alt></xmp:Thumbnails>")


def save_with_xmp(path, picture, xmp, **more):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = xmp
    tags.tagtype[700] = 1
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    options = {"jpg": dict(xmp=xmp), "webp": dict(xmp=xmp), "png": dict(pnginfo=text), "tif": dict(tiffinfo=tags)}
    Image.fromarray(picture).save(path, **options[path.suffix[1:]], **more)


def xmp_in(path):
    "XMP as Pillow sees it."
    with Image.open(path) as image:
        found = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or getattr(image, "tag_v2", {}).get(700)
    return found.encode() if isinstance(found, str) else found


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("stale, expected", [(editor_xmp(), editor_xmp(' t:Orientation="1"'.strip())),
                                             (editor_xmp("", ELEMENTS), editor_xmp("", "<t:Orientation>1</t:Orientation>"))], ids=["attributes", "elements"])
def test_xmp_survives_every_change_of_format_and_tells_no_lies(tmp_path, picture, suffix, target, stale, expected):
    save_with_xmp(tmp_path / f"in.{suffix}", picture, stale)
    assert xmp_in(tmp_path / f"in.{suffix}").rstrip(b"\0") == stale
    photo = read_photo(tmp_path / f"in.{suffix}")
    assert photo.xmp == expected
    out = write_photo(tmp_path / f"out.{target}", replace(photo, pixels=photo.pixels * 0.9))
    assert xmp_in(out) == expected and read_photo(out).xmp == expected and b"OLDPICTURE" not in out.read_bytes()
    with Image.open(out) as image: image.load()


def test_xmp_loses_the_settings_of_a_development(tmp_path, picture):
    crs = 'xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"'
    stale = editor_xmp(f'{crs} crs:Temperature="5200"', "<crs:Masks><rdf:Seq><rdf:li>1</rdf:li></rdf:Seq></crs:Masks>")
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", extratags=[(700, 1, len(stale), stale, True), (33723, 7, len(IPTC), IPTC, True)])
    with open(tmp_path / "a.tif", "rb") as file: assert ph._raw_texts(file) == (stale, IPTC)
    assert read_photo(tmp_path / "a.tif").xmp == ph._clean_xmp(stale, "a.dng") == editor_xmp(crs)
    save_with_xmp(tmp_path / "a.jpg", picture, stale)
    assert b"5200" not in write_photo(tmp_path / "out.jpg", read_photo(tmp_path / "a.jpg")).read_bytes(), "an editor would apply them again"
    film = b"\0\0\0\x18ftypcrx " + bytes(12) + struct.pack(">I", 24 + len(stale)) + b"uuid" + bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + stale
    assert ph._raw_texts(BytesIO(film + b"more")) == (stale, b"")


def test_long_xmp_goes_through_a_jpeg_as_extended_xmp(tmp_path, picture):
    long = editor_xmp("", filler=200_000)
    save_with_xmp(tmp_path / "in.png", picture, long)
    bare = long[long.index(b"<x:"):long.index(b"<?xpacket end")].strip()
    photo = read_photo(write_photo(tmp_path / "out.jpg", read_photo(tmp_path / "in.png")))
    assert photo.xmp == bare and read_photo(write_photo(tmp_path / "again.jpg", photo)).xmp == bare
    with Image.open(tmp_path / "out.jpg") as image: assert b"HasExtendedXMP" in image.info["xmp"] and np.asarray(image).shape == picture.shape
    data = (tmp_path / "out.jpg").read_bytes()
    (tmp_path / "hole.jpg").write_bytes(data.replace(b"." * 60_000, b"." * 59_999 + b"x", 1))  # no longer what its sum says
    with pytest.warns(UserWarning, match="hole.jpg.*extension"): assert b"HasExtendedXMP" not in read_photo(tmp_path / "hole.jpg").xmp
    attribute = re.search(rb" xmpNote:HasExtendedXMP=\"(\w+)\"/>", data)
    element = b"><xmpNote:HasExtendedXMP>%b</xmpNote:HasExtendedXMP></rdf:Description>" % attribute[1]  # as exiftool writes it
    at = data.rindex(b"\xff\xe1", 0, attribute.start()) + 2
    size = struct.unpack_from(">H", data, at)[0] + len(element) - len(attribute[0])
    (tmp_path / "element.jpg").write_bytes(data[:at] + struct.pack(">H", size) + data[at + 2:attribute.start()] + element + data[attribute.end():])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_photo(tmp_path / "element.jpg").xmp
    assert b"Bad" + b"." * 200_000 in found and b"HasExtendedXMP" not in found


@pytest.mark.parametrize("xmp", [b'<!DOCTYPE x [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><x>&b;</x>', editor_xmp()[:-80], b"<a>" * 200_000,
                                 editor_xmp("", filler=5_000_000), b"<x t:y='1'/>", b"\xff\xfe<\0x\0/\0>\0"], ids=["entities", "cut", "deep", "large", "unbound", "utf-16"])
def test_hostile_xmp_is_dropped_with_a_warning(tmp_path, picture, xmp):
    chunk = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)
    data = ph._with_chunks(imagecodecs.png_encode(picture), Photo(None, texts=((b"iTXt", chunk),)))
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.warns(UserWarning, match="bad.png.*XMP") as caught: photo = read_photo(tmp_path / "bad.png")
    assert len(caught) == 1 and photo.xmp == b"" and np.abs(photo.pixels * 255 - picture).max() < 1e-3


def test_packed_texts_cannot_fill_the_memory(tmp_path, picture):
    bomb = zlib.compress(bytes(60_000_000), 9)
    texts = ((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb), (b"zTXt", b"Comment\0\0" + bomb))
    (tmp_path / "bomb.png").write_bytes(ph._with_chunks(imagecodecs.png_encode(picture), Photo(None, texts=texts)))
    tracemalloc.start()
    with pytest.warns(UserWarning, match="bomb.png.*XMP"): photo = read_photo(tmp_path / "bomb.png")
    out = write_photo(tmp_path / "out.png", photo)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 and read_photo(out).texts == texts[1:]


@pytest.mark.parametrize("xmp", [b'<x xmlns:t="http://ns.adobe.com/tiff/1.0/" t:Orientation="6"' + b" " * 1_000_000 + b"/>", b"<x><!--" + b"<?xpacket " * 90_000 + b"--></x>",
                                 b"<x>" + b"<rdf:RDF " * 90_000], ids=["spaces", "wrappers", "unclosed"])
def test_xmp_takes_time_in_proportion_to_its_size(xmp):
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clean = ph._clean_xmp(xmp, "x.jpg")
    ph._xmp_segments(clean)
    guid = ph._md5(xmp)
    ph._joined_xmp(b'<a x:HasExtendedXMP="' + guid + b'"></rdf:RDF>', {guid: {0: xmp}})
    assert time.process_time() - start < 2


def photoshop(iptc):
    "Photoshop's block of resources with a thumbnail, and IPTC."
    part = lambda number, data: b"8BIM" + struct.pack(">HHI", number, 0, len(data)) + data + bytes(len(data) % 2)
    return part(0x040C, b"OLDPICTURE") + part(0x0409, b"OLDPICTURE.") + part(0x0404, iptc) + part(0x03ED, bytes(16))


@pytest.mark.parametrize("kind", ["jpg", "tif bytes", "tif numbers", "tif big-endian", "tif resources"])
@pytest.mark.parametrize("target", ["jpg", "tif"])
def test_iptc_survives_between_jpeg_and_tiff(tmp_path, picture, kind, target):
    source, iptc = tmp_path / f"in.{kind[:3]}", IPTC + bytes(-len(IPTC) % 4 if "numbers" in kind or "endian" in kind else 0)
    if kind == "jpg":
        data, payload = imagecodecs.jpeg8_encode(picture, 95), b"Photoshop 3.0\0" + photoshop(iptc)
        source.write_bytes(data[:2] + b"\xff\xed" + struct.pack(">H", len(payload) + 2) + payload + data[2:])
    else:
        numbers = (33723, "I", len(iptc) // 4, np.frombuffer(iptc[:len(iptc) // 4 * 4], "<u4"), True)
        tag = dict(bytes=(33723, 7, len(iptc), iptc, True), resources=(34377, 7, len(photoshop(iptc)), photoshop(iptc), True)).get(kind[4:], numbers)
        tifffile.imwrite(source, picture, photometric="rgb", extratags=[tag], byteorder=">" if "endian" in kind else "<")
    photo = read_photo(source)
    assert photo.iptc == iptc
    out = write_photo(tmp_path / f"out.{target}", photo)
    assert read_photo(out).iptc == iptc and b"OLDPICTURE" not in out.read_bytes()
    with Image.open(out) as image: assert IptcImagePlugin.getiptcinfo(image) == {(2, 5): b"Kitchen", (2, 25): b"bath"}


def test_comments_texts_and_resolution_survive(tmp_path, picture):
    image, text = Image.fromarray(picture), PngImagePlugin.PngInfo()
    text.add_text("Author", "José", zip=True), text.add_itxt("Title", "台所", "zh", "题目"), text.add_text("Comment", "by hand")
    image.save(tmp_path / "in.png", pnginfo=text, dpi=(300, 200))
    image.save(tmp_path / "in.jpg", comment=b"by hand", dpi=(300, 200))
    image.save(tmp_path / "in.tif", dpi=(300, 200))
    for suffix in ("png", "jpg", "tif"):
        photo = read_photo(tmp_path / f"in.{suffix}")
        for target in {"png", "jpg", "tif"} - ({"tif"} if suffix == "png" else set()) if suffix != "tif" else {"tif"}:
            lossy = (suffix, target) in (("png", "jpg"), ("jpg", "tif"))
            with pytest.warns(UserWarning, match=f"out.{target}.*text chunks") if lossy else nullcontext():
                out = write_photo(tmp_path / f"out.{target}", photo)
            with Image.open(out) as image:
                assert np.allclose(image.info["dpi"], (300, 200), atol=0.01), (suffix, target)
                comment = image.info.get("comment") or image.info.get("Comment")
                if target != "tif": assert comment in ("by hand", b"by hand")
                if suffix == target == "png": assert (image.text["Author"], image.text["Title"], image.text["Title"].tkey) == ("José", "台所", "题目")
            again = read_photo(out)
            if suffix == target: assert (again.texts, again.density, again.exif) == (photo.texts, photo.density, photo.exif)
    with pytest.warns(UserWarning, match="out.webp.*text chunks and resolution"): write_photo(tmp_path / "out.webp", read_photo(tmp_path / "in.jpg"))
    with pytest.warns(UserWarning, match="out.webp.*IPTC"): write_photo(tmp_path / "out.webp", Photo(picture / np.float32(255), iptc=IPTC))


@pytest.mark.parametrize("suffix, density", [("jpg", (2, 1, 0)), ("jpg", (118, 118, 0.01)), ("png", (2, 1, 0)), ("png", (11811, 11811, 1))])
def test_density_keeps_its_unit(tmp_path, picture, suffix, density):
    assert read_photo(write_photo(tmp_path / f"a.{suffix}", Photo(picture / np.float32(255), density=density))).density == density
    with tifffile.TiffFile(write_photo(tmp_path / "a.tif", Photo(picture / np.float32(255), density=density))) as tif:
        tags = tif.pages[0].tags
        assert tags[296].value == (3 if density[2] else 1) and tags[282].value[0] / tags[282].value[1] == pytest.approx(density[0] * (0.01 / density[2] if density[2] else 1))


# ---- colour

@pytest.mark.parametrize("icc", [ph.ADOBE_RGB, P3, PROPHOTO], ids=["adobe", "p3", "prophoto"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_profile_is_honoured_and_returned(tmp_path, picture, icc, suffix):
    source = tmp_path / f"in.{suffix}"
    Image.fromarray(picture).save(source, icc_profile=icc, **(dict(quality=100, subsampling=0) if suffix == "jpg" else dict(lossless=True) if suffix == "webp" else {}))
    photo = read_photo(source)
    with Image.open(source) as image: stored = np.asarray(image)
    expected = np.clip(imagecodecs.cms_transform(stored, icc, ph.SRGB, colorspace="rgb", outcolorspace="rgb", outdtype="float32", intent=1), 0, 1)
    assert np.abs(photo.pixels - expected).max() < 2e-3
    assert np.abs(photo.pixels - stored / 255).max() > 0.02, "the profile must have made a difference"
    out = write_photo(tmp_path / f"out.{suffix}", photo, quality=100)
    with Image.open(out) as image: again, carried = np.asarray(image).astype(int), image.info["icc_profile"]
    assert carried == icc and np.abs(again - stored).max() <= (4 if suffix == "jpg" else 1)


def test_profiles_of_tables_take_the_slow_way_to_the_same_place(tmp_path, picture, monkeypatch):
    source = tmp_path / "in.png"
    Image.fromarray(picture).save(source, icc_profile=P3)
    fast = read_photo(source)
    ph._space.cache_clear()
    monkeypatch.setattr(ph, "_matrix_space", lambda icc: None)
    slow = read_photo(source)
    assert ph._space(P3).kind == "cms"
    out = write_photo(tmp_path / "out.png", slow)
    ph._space.cache_clear()
    assert np.abs(fast.pixels - slow.pixels).max() < 1e-3
    with Image.open(out) as image: assert np.abs(np.asarray(image).astype(int) - picture).max() <= 1


def test_colours_beyond_srgb_survive_an_edit(tmp_path):
    pure = np.zeros((40, 60, 3), np.uint8)
    pure[:, :20, 0] = pure[:, 20:40, 1] = pure[:, 40:, 2] = 230
    Image.fromarray(pure).save(tmp_path / "in.png", icc_profile=P3)
    photo = read_photo(tmp_path / "in.png")
    assert photo.pixels.min() >= 0 and photo.pixels.max() <= 1
    with Image.open(write_photo(tmp_path / "same.png", photo)) as image: assert np.abs(np.asarray(image).astype(int) - pure).max() <= 1
    with Image.open(write_photo(tmp_path / "dark.png", replace(photo, pixels=photo.pixels * 0.8))) as image: dark = np.asarray(image)
    with Image.open(write_photo(tmp_path / "flat.png", replace(photo, pixels=photo.pixels * 0.8, wide=None))) as image: flat = np.asarray(image)
    for x, channel in ((10, 0), (30, 1), (50, 2)):
        others = [c for c in range(3) if c != channel]
        assert dark[20, x, others].max() <= flat[20, x, others].max() and 140 < dark[20, x, channel] < 215
    assert dark[20, 30, 0] < flat[20, 30, 0] - 30, "the green must stay deeper than sRGB allows"


def test_adobe_rgb_declared_only_in_exif(tmp_path, picture):
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({40961: 65535, 40965: {1: "R03"}})
    Image.fromarray(picture).save(tmp_path / "in.jpg", quality=100, subsampling=0, exif=exif)
    photo = read_photo(tmp_path / "in.jpg")
    assert photo.icc == ph.ADOBE_RGB and np.abs(photo.pixels - picture / 255).max() > 0.02


def cmyk_profile():
    "A CMYK profile made of nothing but its 16 corners (ICC.1, lut8Type), RGB = (1 - ink)(1 - black)."
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lab = rgb2lab(((1 - corners[:, :3]) * (1 - corners[:, 3:]) * 0.9 + 0.05)[None], illuminant="D65")[0]
    table = np.clip(np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], 1).round(), 0, 255).astype(np.uint8).tobytes()
    ramp, fixed = bytes(range(256)), lambda v: struct.pack(">i", round(v * 65536))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + b"".join(fixed(v) for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)) + ramp * 4 + table + ramp * 3
    lut += bytes(-len(lut) % 4)
    tags = {b"A2B0": lut, b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642) + fixed(1) + fixed(0.8249), b"cprt": b"text" + bytes(8),
            b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(83)}
    at, index, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        index += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp" + bytes(24)
    head += struct.pack(">I", 0) + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_goes_through_its_profile_and_comes_out_as_srgb(tmp_path, suffix):
    ink = np.zeros((32, 64, 4), np.uint8)
    ink[:, 16:32, 0], ink[:, 32:48, 1], ink[:, 48:, 3] = 255, 255, 128
    options = dict(quality=100, subsampling=0) if suffix == "jpg" else {}
    Image.fromarray(ink, "CMYK").save(tmp_path / f"in.{suffix}", icc_profile=cmyk_profile(), **options)
    photo = read_photo(tmp_path / f"in.{suffix}")
    paper, cyan, magenta, half = (photo.pixels[16, x] for x in (8, 24, 40, 56))
    assert paper.min() > 0.9 and cyan[0] < 0.3 and min(cyan[1:]) > 0.8 and magenta[1] < 0.3 and 0.3 < half.mean() < 0.7
    assert photo.icc == b"" and read_photo(write_photo(tmp_path / "out.jpg", photo)).pixels.shape == (32, 64, 3)
    assert read_photo(tmp_path / f"in.{suffix}", long_side=32).pixels.shape == (16, 32, 3)


def test_profile_of_the_wrong_kind_is_dropped_with_a_warning(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "in.png", icc_profile=cmyk_profile())
    with pytest.warns(UserWarning, match="in.png.*cmyk"): assert read_photo(tmp_path / "in.png").icc == b""


# ---- varieties of files

def test_sixteen_bits_without_profile_are_exact(tmp_path):
    codes = np.random.default_rng(1).integers(0, 65536, (50, 70, 3), dtype=np.uint16)
    for suffix in ("png", "tif"):
        tifffile.imwrite(tmp_path / "in.tif", codes, photometric="rgb")
        out = write_photo(tmp_path / f"out.{suffix}", read_photo(tmp_path / "in.tif"))
        assert np.array_equal(tifffile.imread(out) if suffix == "tif" else imagecodecs.png_decode(out.read_bytes()), codes)
    low = write_photo(tmp_path / "low.png", read_photo(tmp_path / "in.tif"), bit_depth=8)
    assert np.array_equal(imagecodecs.png_decode(low.read_bytes()), np.rint(codes / 257).astype(np.uint8)), "rounded, not cut off"


@pytest.mark.parametrize("kind", ["planar", "tiled", "lzw", "white is zero", "palette", "bigtiff", "big-endian", "premultiplied", "mask"])
def test_tiff_varieties(tmp_path, picture, kind):
    path, rgb, expected = tmp_path / "a.tif", dict(photometric="rgb"), picture / 255
    alpha = np.full(picture.shape[:2], 128, np.uint8)
    if kind == "planar": tifffile.imwrite(path, picture.transpose(2, 0, 1), planarconfig="separate", **rgb)
    if kind == "tiled": tifffile.imwrite(path, picture, tile=(32, 32), compression="zlib", **rgb)
    if kind == "lzw": tifffile.imwrite(path, picture, compression="lzw", predictor=True, **rgb)
    if kind == "bigtiff": tifffile.imwrite(path, picture, bigtiff=True, **rgb)
    if kind == "big-endian": tifffile.imwrite(path, picture.astype(np.uint16) * 257, byteorder=">", **rgb)
    if kind == "white is zero":
        tifffile.imwrite(path, 255 - picture[..., 0], photometric="miniswhite")
        expected = np.repeat(picture[..., :1], 3, 2) / 255
    if kind == "palette":
        tifffile.imwrite(path, picture[..., 0], photometric="palette", colormap=np.uint16([range(256), [0] * 256, [99] * 256]) * 257)
        expected = np.dstack([picture[..., 0], 0 * alpha, 0 * alpha + 99]) / 255
    if kind == "premultiplied": tifffile.imwrite(path, np.dstack([(picture * (128 / 255)).round().astype(np.uint8), alpha]), extrasamples=["assocalpha"], **rgb)
    if kind == "mask": tifffile.imwrite(path, np.dstack([picture, alpha]), extrasamples=["unspecified"], **rgb)
    photo = read_photo(path)
    assert np.abs(photo.pixels - expected).max() < (1.1 / 128 if kind == "premultiplied" else 1e-6)
    assert photo.grey == (kind == "white is zero") and photo.bit_depth == (16 if kind == "big-endian" else 8)
    assert (photo.alpha is not None) == (kind == "premultiplied")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "I;16"])
def test_png_varieties(tmp_path, picture, mode):
    image = Image.fromarray(picture[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(picture).convert("P" if mode == "PA" else mode)
    image.save(tmp_path / "a.png", **(dict(transparency=3) if mode == "PA" else {}))
    photo = read_photo(tmp_path / "a.png")
    expected = np.repeat(picture[..., :1], 3, 2) if mode == "I;16" else np.asarray(image.convert("RGBA"))[..., :3]
    assert np.abs(photo.pixels * 255 - expected).max() < 1e-3
    assert photo.grey == (mode in ("1", "L", "LA", "I;16")) and (photo.alpha is not None) == (mode in ("LA", "PA", "RGBA"))
    out = read_photo(write_photo(tmp_path / "out.png", photo))
    assert np.array_equal(out.pixels, photo.pixels) and (out.grey, out.bit_depth) == (photo.grey, photo.bit_depth)


@pytest.mark.parametrize("options", [dict(progressive=True), dict(subsampling=2), dict(restart_marker_blocks=1), dict(optimize=True)], ids=str)
def test_jpeg_varieties(tmp_path, picture, options):
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=98, **options)
    photo = read_photo(tmp_path / "a.jpg")
    assert np.abs(photo.pixels * 255 - picture).mean() < 2
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "trailer.jpg").write_bytes(data + b"a phone appends all sorts of things" * 9)
    assert np.array_equal(read_photo(tmp_path / "trailer.jpg").pixels, photo.pixels)
    for keep in (0.3, 0.6, 0.95):
        (tmp_path / "cut.jpg").write_bytes(data[:int(len(data) * keep)])
        with pytest.raises(PhotoError, match="cut.jpg"): read_photo(tmp_path / "cut.jpg")
    (tmp_path / "hole.jpg").write_bytes(data[:len(data) // 2] + bytes(len(data) // 2))  # a copy that stopped on a full disk
    with pytest.raises(PhotoError, match="hole.jpg"): read_photo(tmp_path / "hole.jpg")


@pytest.mark.parametrize("long_side", [None, 200])
@pytest.mark.parametrize("options", [dict(), dict(progressive=True), dict(subsampling=0), dict(restart_marker_rows=4)], ids=str)
def test_jpeg_damaged_in_the_middle_is_refused(tmp_path, options, long_side):
    rng = np.random.default_rng(0)
    large = cv2.resize(rng.integers(30, 226, (30, 40, 3), dtype=np.uint8), (800, 600), interpolation=cv2.INTER_LINEAR)
    Image.fromarray(large + rng.integers(0, 20, large.shape, dtype=np.uint8)).save(tmp_path / "a.jpg", quality=90, **options)
    data, noticed = (tmp_path / "a.jpg").read_bytes(), 0
    assert read_photo(tmp_path / "a.jpg", long_side).pixels.shape == ((600, 800, 3) if long_side is None else (150, 200, 3))
    for seed in range(12):
        rng = np.random.default_rng(seed)
        at = int(len(data) * rng.uniform(0.2, 0.8))
        (tmp_path / "bad.jpg").write_bytes(data[:at] + (rng.bytes(2000) if seed % 2 else bytes(2000)) + data[at + 2000:])
        try: read_photo(tmp_path / "bad.jpg", long_side)
        except PhotoError as e: noticed += str(e).startswith(f"{tmp_path / 'bad.jpg'}: cannot be read")
    assert noticed >= (9 if "progressive" in options else 12), "zeros can be valid in a scan of a progressive JPEG"


def test_padding_before_the_end_of_a_jpeg_is_no_damage(tmp_path, picture):
    data = imagecodecs.jpeg8_encode(picture, 95)
    (tmp_path / "a.jpg").write_bytes(data[:-2] + bytes(300) + data[-2:] + b"trailer \xff\xd9")
    assert np.array_equal(ph._quantised(read_photo(tmp_path / "a.jpg").pixels, 8), imagecodecs.jpeg8_decode(data))


def test_filling_takes_time_in_proportion_to_its_size(picture):
    data = imagecodecs.jpeg8_encode(picture, 95)
    start = time.process_time()
    assert ph._jpeg_end(data[:-2] + b"\xff" * 200_000) == 0 and ph._jpeg_end(data[:-2] + b"\xff" * 200_000 + b"\xd9") == len(data) + 199_997
    assert time.process_time() - start < 1
    assert ph._is_padding(data[:-2] + bytes(9) + b"\xff\xff\xff\xd9", "9 extraneous bytes before marker 0xd9")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 0xff, 0xd0, 0xd7, 0xd9, 0xda, 1]), max_size=40).map(bytes), st.integers(0, 40))
def test_markers_are_found_as_their_definition_has_it(data, at):
    "Any number of FF, then a code: of which none is missed in the middle of a run."
    slow = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.S)
    assert [(m.end(), m[1]) for m in ph._MARKER.finditer(data, at)] == [(m.end(), m[1]) for m in slow.finditer(data, at)]


def odd_jpegs(picture):
    "Name, data and colours of JPEGs with what is odd about their headers, though harmless."
    out = {}
    for mode in ("RGB", "CMYK"):
        buffer = BytesIO()
        Image.fromarray(picture).convert(mode).save(buffer, "JPEG", quality=90)
        out[mode] = bytearray(buffer.getvalue())
    yield "plain cmyk", bytes(out["CMYK"])
    version, scan = bytearray(out["RGB"]), bytearray(out["RGB"])
    version[11] = 2
    yield "version", bytes(version)
    scan[scan.index(b"\xff\xda") + 12] = 0  # the last coefficient, which is 63
    yield "scan", bytes(scan)
    transform = bytearray(out["CMYK"])
    transform[transform.index(b"Adobe") + 11] = 7
    yield "transform", bytes(transform)


def test_a_harmless_oddity_hides_no_damage(tmp_path):
    rng = np.random.default_rng(0)
    large = cv2.resize(rng.integers(30, 226, (30, 40, 3), dtype=np.uint8), (400, 300)) + rng.integers(0, 20, (300, 400, 3), dtype=np.uint8)
    for name, data in odd_jpegs(large):
        path, middle = tmp_path / f"{name}.jpg", len(data) // 2
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_photo(path).pixels.shape == (300, 400, 3), name
        for at in (middle // 2, middle, middle * 3 // 2):
            path.write_bytes(data[:at] + rng.integers(0, 255, 400, dtype=np.uint8).tobytes() + data[at + 400:])  # no markers
            with pytest.raises(PhotoError, match=f"{name}.jpg.*damaged"): read_photo(path)
        path.write_bytes(data[:-2] + bytes(50) + data[-2:])
        assert read_photo(path).pixels.shape == (300, 400, 3), "padding is no damage"


def test_a_profile_in_odd_pieces_does_not_stop_a_photo(tmp_path, picture):
    data = imagecodecs.jpeg8_encode(picture, 95)
    for i, (number, count, more) in enumerate(((2, 1, 40), (1, 2, 40), (0, 0, 0))):
        piece = b"ICC_PROFILE\0" + bytes([number, count]) + b"x" * more
        (tmp_path / f"{i}.jpg").write_bytes(data[:20] + struct.pack(">HH", 0xffe2, len(piece) + 2) + piece + data[20:])
        with pytest.warns(UserWarning, match="profile") if more else nullcontext(): photo = read_photo(tmp_path / f"{i}.jpg")
        assert np.array_equal(ph._quantised(photo.pixels, 8), imagecodecs.jpeg8_decode(data))


def test_what_hides_damage_is_told(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg", progressive=True)
    data = (tmp_path / "a.jpg").read_bytes()
    scans = [m.start() for m in re.finditer(rb"\xff\xda", data)]
    twice = data[:scans[2]] + data[scans[1]:]  # the same coefficients again
    (tmp_path / "twice.jpg").write_bytes(twice)
    with pytest.warns(UserWarning, match="twice.jpg.*progression"): assert read_photo(tmp_path / "twice.jpg").pixels.shape == (60, 80, 3)


@pytest.mark.filterwarnings("ignore:.*out.webp.*resolution")
@pytest.mark.parametrize("payload", [struct.pack(">IIB", 2835, 2835, 2), bytes(8), struct.pack(">IIB", 0, 0, 1), struct.pack(">IIB", 1, 1, 1)], ids=["unit", "short", "none", "tiny"])
def test_an_odd_resolution_of_a_png_does_not_stop_a_photo(tmp_path, picture, payload):
    data = imagecodecs.png_encode(picture)
    chunk = struct.pack(">I", len(payload)) + b"pHYs" + payload + struct.pack(">I", zlib.crc32(b"pHYs" + payload))
    (tmp_path / "in.png").write_bytes(data[:33] + chunk + data[33:])
    for target in ("png", "jpg", "tif", "webp"):
        assert read_photo(write_photo(tmp_path / f"out.{target}", read_photo(tmp_path / "in.png"))).pixels.shape == picture.shape


@pytest.mark.parametrize("mode, size", [("L", (801, 603)), ("RGB", (801, 603)), ("RGB", (1601, 37))])
def test_the_strict_jpeg_decoder_gives_the_usual_values(tmp_path, mode, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 2)).convert(mode).save(tmp_path / "a.jpg", quality=90)
    data = (tmp_path / "a.jpg").read_bytes()
    header, kind = ph._jpeg_header(data), "GRAYSCALE" if mode == "L" else "COLOR"
    strictly = lambda by: ph._decode_strictly(data, header, by, "GRAY" if mode == "L" else "RGB")[0].squeeze()
    assert np.array_equal(strictly(1), imagecodecs.jpeg8_decode(data))
    for by in (2, 4, 8):
        reduced = cv2.imdecode(np.frombuffer(data, np.uint8), getattr(cv2, f"IMREAD_REDUCED_{kind}_{by}"))
        assert np.array_equal(strictly(by), reduced[..., ::-1] if mode == "RGB" else reduced)


def test_wrongly_named_file_is_told_by_its_content(tmp_path, picture):
    (tmp_path / "really_jpeg.png").write_bytes(imagecodecs.jpeg8_encode(picture, 98))
    assert read_photo(tmp_path / "really_jpeg.png").format == "JPEG"


def test_refusals_name_the_file(tmp_path, picture):
    tifffile.imwrite(tmp_path / "float.tif", picture.astype(np.float32), photometric="rgb")
    with pytest.raises(PhotoError, match="float.tif.*float32.*8- or 16-bit"): read_photo(tmp_path / "float.tif")
    tifffile.imwrite(tmp_path / "lab.tif", picture, photometric="cielab")
    with pytest.raises(PhotoError, match="lab.tif.*CIELAB"): read_photo(tmp_path / "lab.tif")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(PhotoError, match="page.jpg: not a photograph"): read_photo(tmp_path / "page.jpg")
    (tmp_path / "full").write_text("a file, not a folder")
    with pytest.raises((PhotoError, OSError)): write_photo(tmp_path / "full" / "a.jpg", picture / np.float32(255))


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    bomb = bytearray(imagecodecs.png_encode(np.zeros((8, 8, 3), np.uint8)))
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    for name in ("png_decode", "jpeg8_decode"): monkeypatch.setattr(ph.imagecodecs, name, lambda *a, **k: pytest.fail("it was decoded"))
    for call in (read_photo, read_size):
        with pytest.raises(PhotoError, match="bomb.png.*60000 x 60000.*max_pixels"): call(tmp_path / "bomb.png")


def test_failed_write_leaves_the_old_file(tmp_path, picture, monkeypatch):
    out = write_photo(tmp_path / "a.jpg", picture / np.float32(255))
    before = out.read_bytes()
    monkeypatch.setattr(ph, "_with_segments", lambda *a: 1 / 0)
    with pytest.raises(PhotoError, match="a.jpg"): write_photo(out, picture / np.float32(255))
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.jpg"]


@pytest.mark.parametrize("subsampling, factors", [("4:4:4", (1, 1)), ("4:2:2", (2, 1)), ("4:2:0", (2, 2))])
def test_jpeg_settings_reach_the_file(tmp_path, picture, subsampling, factors):
    out = write_photo(tmp_path / "a.jpg", picture / np.float32(255), quality=80, subsampling=subsampling)
    with Image.open(out) as image: assert image.layer[0][1:3] == factors
    assert len(out.read_bytes()) < len(write_photo(tmp_path / "b.jpg", picture / np.float32(255), quality=99, subsampling=subsampling).read_bytes())


# ---- size

def test_small_reads_use_the_decoders_reduction(tmp_path, monkeypatch):
    y, x = np.mgrid[0:1600, 0:2400].astype(np.float32)
    large = np.uint8(127 + 60 * np.sin(x / 90)[..., None] * np.cos(y / 70)[..., None] * np.float32([1, 0.8, 0.5]))
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(large, 95))
    full = resize(read_photo(tmp_path / "a.jpg").pixels, 341, 512)
    sizes, decode = [], ph._decode_strictly
    monkeypatch.setattr(ph, "_decode_strictly", lambda *a: (out := decode(*a), sizes.append(out[0].shape))[0])
    small = read_photo(tmp_path / "a.jpg", long_side=512)
    assert sizes == [(400, 600, 3)], "a quarter: the smallest that is not below 512"
    assert small.pixels.shape == (341, 512, 3) and np.abs(small.pixels - full).max() < 0.02


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))
def test_resize_keeps_the_shape_and_the_mean(h, w, to_h, to_w):
    flat = np.full((h, w, 3), 0.3, np.float32)
    out = resize(flat, to_h, to_w)
    assert out.shape == (to_h, to_w, 3) and np.abs(out - 0.3).max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["jpg", "png", "tif", "webp"]), st.sampled_from([b"", P3]), st.booleans())
def test_any_size_goes_there_and_back(tmp_path_factory, h, w, suffix, icc, has_alpha):
    folder = tmp_path_factory.mktemp("any")
    pixels = np.full((h, w, 3), (0.2, 0.5, 0.8), np.float32)
    photo = read_photo(write_photo(folder / f"a.{suffix}", Photo(pixels, icc=icc, alpha=np.ones((h, w), np.float32) if has_alpha else None)))
    assert photo.pixels.shape == (h, w, 3) and np.abs(photo.pixels - pixels).max() < 0.03 and photo.icc == icc


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real photographs of ../shared/data")
def test_real_photographs(tmp_path):
    for path in ph.find_photos(REAL)[:2]:
        photo = read_photo(path)
        assert photo.pixels.shape[:2] == read_size(path) and not photo.icc
        with Image.open(path) as image: assert np.abs(photo.pixels * 255 - np.asarray(image)).max() < 1e-3
        assert np.array_equal(read_photo(write_photo(tmp_path / "a.png", photo)).pixels, photo.pixels)
        again = read_photo(write_photo(tmp_path / "a.jpg", photo))
        assert np.sqrt(np.mean((again.pixels - photo.pixels) ** 2)) * 255 < 2
