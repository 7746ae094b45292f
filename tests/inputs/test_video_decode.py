"""Real video files, written by the test: every frame shows its own number."""

from fractions import Fraction

import numpy as np
import pytest

from llave_jax.inputs import video, video_decode
from llave_jax.inputs.images import ImageError
from llave_jax.models.config import PRESETS

av = pytest.importorskip("av")

BITS = 8


def picture(number: int) -> np.ndarray:
    """The number in binary, as black and white blocks that survive any lossy codec."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 255, 16)
    return np.broadcast_to(row[None, :, None], (64, 16 * BITS, 3)).copy()


def read_number(image) -> int:
    assert image.mode == "RGB"
    assert image.size == (16 * BITS, 64)
    values = np.asarray(image)[32, 8::16, 0]
    return sum(int(value > 127) << bit for bit, value in enumerate(values))


def write_video(path, count, *, codec="libx264", fps=Fraction(25), times=None, options=None):
    """`times`: presentation times in milliseconds, for a variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = 16 * BITS, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = options or {}
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("suffix", "codec", "fps", "count"),
    [
        ("mp4", "libx264", Fraction(25), 60),
        ("mp4", "libx265", Fraction(30000, 1001), 40),
        ("avi", "mpeg4", Fraction(10), 33),
        ("avi", "mjpeg", Fraction(15), 20),
        ("mkv", "ffv1", Fraction(24), 20),
        ("webm", "libvpx-vp9", Fraction(60), 70),
        ("mpg", "mpeg2video", Fraction(25), 30),
        ("mp4", "libx264", Fraction(2), 5),
        ("mp4", "libx264", Fraction(30), 1),
    ],
)
def test_frames_by_index(tmp_path, suffix, codec, fps, count):
    path = write_video(tmp_path / f"v.{suffix}", count, codec=codec, fps=fps)
    seen = []

    def indices(num_frames, average_fps):
        seen.append((num_frames, average_fps))
        return range(num_frames)

    frames = video_decode.decode_frames(path, indices)
    assert [read_number(frame) for frame in frames] == list(range(count))
    assert seen[-1][0] == count
    assert seen[-1][1] == pytest.approx(float(fps), rel=1e-3)


def test_sampling_is_the_papers(tmp_path):
    """25 per second: every 8th frame, until those would be more than 32."""
    inputs = PRESETS["llave-0.5b"].inputs
    short = write_video(tmp_path / "short.mp4", 60)
    frames = video.load_frames(short, inputs)
    assert [read_number(frame) for frame in frames] == list(range(0, 60, 8))
    long = write_video(tmp_path / "long.mp4", 250, fps=Fraction(12))
    frames = video.load_frames(str(long), inputs)
    # 250 / 4 = 63 frames: too many.
    expected = [int(249 * i / 31) for i in range(32)]
    assert [read_number(frame) for frame in frames] == expected


def test_variable_frame_rate_counts_frames_not_time(tmp_path):
    times = np.cumsum([0] + [20] * 30 + [200] * 10 + [40] * 9).tolist()
    path = write_video(tmp_path / "v.mkv", 50, fps=Fraction(25), times=times)
    seen = []

    def indices(num_frames, average_fps):
        seen.append(average_fps)
        return range(0, num_frames, 7)

    frames = video_decode.decode_frames(path, indices)
    assert [read_number(frame) for frame in frames] == list(range(0, 50, 7))
    with av.open(str(path)) as container:
        assert seen == [float(container.streams.video[0].average_rate)]


@pytest.mark.parametrize(
    ("suffix", "codec"), [("avi", "mpeg4"), ("mkv", "libx264"), ("ts", "libx264")]
)
def test_truncated_file_gives_the_frames_it_has(tmp_path, suffix, codec):
    whole = write_video(tmp_path / f"whole.{suffix}", 200, codec=codec)
    path = tmp_path / f"cut.{suffix}"
    content = whole.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    counts = []

    def indices(num_frames, average_fps):
        counts.append(num_frames)
        return np.linspace(0, num_frames - 1, 9).astype(int).tolist()

    frames = video_decode.decode_frames(path, indices)
    assert 50 < counts[-1] < 200
    numbers = [read_number(frame) for frame in frames]
    # The frame at the cut may be damaged.
    assert numbers[:-1] == indices(counts[-1], 25.0)[:-1]


def test_damage_in_the_middle_costs_only_what_it_hits(tmp_path):
    path = write_video(tmp_path / "v.avi", 120, codec="mpeg4", options={"g": "10"})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    frames = video_decode.decode_frames(path, lambda num_frames, fps: range(num_frames))
    numbers = [read_number(frame) for frame in frames]
    assert len(numbers) > 110
    assert numbers[:30] == list(range(30))
    assert numbers[-70:] == list(range(50, 120))


def test_unreadable_files_are_named(tmp_path):
    def indices(num_frames, average_fps):
        return [0]

    with pytest.raises(ImageError, match=r"data.csv: row 3 \(.*lost.mp4\): .*does not exist"):
        video_decode.decode_frames(tmp_path / "lost.mp4", indices, "data.csv: row 3")
    whole = write_video(tmp_path / "whole.mp4", 30)
    # An mp4 file keeps its index at the end.
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:-500])
    with pytest.raises(ImageError, match=r"cut.mp4: not a readable video"):
        video_decode.decode_frames(cut, indices)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ImageError, match="no video stream"):
        video_decode.decode_frames(tmp_path / "sound.wav", indices)


def test_missing_decoder_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(video_decode, "av", None)
    with pytest.raises(ImportError, match=r"llave_jax\[video\]"):
        video_decode.decode_frames("v.mp4", lambda n, fps: [0])


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video}\n",
    "list.ffconcat": "ffconcat version 1.0\nfile {video}\n",
    "list.mpd": '<?xml version="1.0"?><MPD><Period><BaseURL>{video}</BaseURL></Period></MPD>\n',
    "list.sdp": "v=0\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("name", [*PLAYLISTS, "hidden.mp4"])
def test_playlists_are_not_followed(tmp_path, name):
    """They name other files, and one without an end is waited for."""
    video_file = write_video(tmp_path / "v.mp4", 3)
    path = tmp_path / name
    path.write_text(PLAYLISTS.get(name, PLAYLISTS["list.m3u8"]).format(video=video_file))
    with pytest.raises(ImageError, match=rf"{name}: not a readable video in a container such as"):
        video_decode.decode_frames(path, lambda n, fps: [0])


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FRAMES", 10, "more than 10 frames"),
        ("MAX_FRAME_PIXELS", 100, "frames of 128 x 64 pixels; the limit is 100"),
        ("MAX_SECONDS", 0, "is not read within 0 seconds|not a readable video"),
        ("MAX_FRAMES_READ", 5, "30 frames would be read; the limit is 5"),
    ],
)
def test_limits(tmp_path, monkeypatch, limit, value, message):
    path = write_video(tmp_path / "v.mp4", 30)
    monkeypatch.setattr(video_decode, limit, value)
    with pytest.raises(ImageError, match=rf"v\.mp4: {message}|{message}"):
        video_decode.decode_frames(path, lambda n, fps: range(n))
