"""Files are written whole or not at all; pipes and devices are written through."""

import os
import socket
import stat
import threading
from pathlib import Path

from tempo_mlx.errors import TempoError
from tempo_mlx.io.files import Stream, check_writable, same_file, write_atomically, writing

import pytest


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def read_from(fifo, received):
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    return reader


@pytest.fixture
def umask():
    """Sets the mask of this process, and restores it."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_is_as_readable_as_the_umask_allows(tmp_path, umask, mask):
    umask(mask)
    write_atomically(tmp_path / "new", "text")
    assert mode(tmp_path / "new") == 0o666 & ~mask


@pytest.mark.parametrize("given", [0o600, 0o664])
def test_a_file_that_is_replaced_passes_on_its_mode(tmp_path, given):
    path = tmp_path / "old"
    path.write_text("old")
    path.chmod(given)
    write_atomically(path, b"new")
    assert path.read_text() == "new" and mode(path) == given


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "kept"
    path.write_text("kept")
    with pytest.raises(RuntimeError), writing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "kept" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False])
def test_links_stay_and_their_target_is_written(tmp_path, there):
    (tmp_path / "folder").mkdir()
    target, link, outer = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "outer"
    if there:
        target.write_text("old")
    link.symlink_to("folder/target")
    outer.symlink_to(link)
    write_atomically(outer, "new")
    assert target.read_text() == "new" and link.is_symlink() and outer.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "outer"]


def test_a_pipe_is_written_through(tmp_path):
    fifo, received = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = read_from(fifo, received)
    check_writable("--output", fifo)
    write_atomically(fifo, "text")
    reader.join()
    assert received == [b"text"] and stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_stream_writes_each_text_when_it_comes():
    read, write = os.pipe()
    with Stream(Path(f"/dev/fd/{write}")) as stream:
        stream.write("first")
        assert os.read(read, 100) == b"first"
        stream.write("second")
        assert os.read(read, 100) == b"second"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("linked", [False, True])
def test_a_descriptor_is_written_where_it_stands(tmp_path, linked):
    file = tmp_path / "file"
    with file.open("w") as opened:
        opened.write("before ")
        opened.flush()
        path = Path(f"/dev/fd/{opened.fileno()}")
        if linked:
            path = tmp_path / "link"
            path.symlink_to(f"/dev/fd/{opened.fileno()}")
        check_writable("--output", path)
        write_atomically(path, "text ")
        opened.write("after")
    assert file.read_text() == "before text after"


def test_standard_output_keeps_the_order_of_what_is_printed(capsys):
    print("before", end=" ")
    write_atomically(Path("/dev/stdout"), "text")
    print(" after", end="")
    assert capsys.readouterr().out == "before text after"


def test_a_reader_may_leave_before_the_end():
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        os.write(write, b"text")
    write_atomically(Path(f"/dev/fd/{write}"), "text")
    os.close(write)


@pytest.mark.parametrize("name", ["no/file", "file/below", "loop"])
def test_errors_name_the_file(tmp_path, name):
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name
    with pytest.raises(OSError) as error:
        write_atomically(path, "text")
    assert str(path) in str(error.value)
    with pytest.raises(TempoError, match=f"--output {path} cannot be written"):
        check_writable("--output", path)
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_no_space_left_names_the_file(tmp_path):
    full = tmp_path / "link"
    full.symlink_to("/dev/full")
    check_writable("--output", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_atomically(full, "text")
    assert error.value.filename == str(full) and full.is_symlink()
    with pytest.raises(OSError, match="No space left on device"), Stream(full) as stream:
        stream.write("text")


def test_unwritable_kinds_of_files_are_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(TempoError, match="must be a file, a pipe or a character device"):
            check_writable("--output", tmp_path / "socket")
    with open(os.devnull) as nothing, pytest.raises(TempoError, match="open for reading only"):
        check_writable("--output", Path(f"/dev/fd/{nothing.fileno()}"))
    with pytest.raises(TempoError, match="is a folder"):
        check_writable("--output", tmp_path)


def test_a_file_that_is_read_only_stays(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("text")
    file.chmod(0o444)
    link.symlink_to(file)
    for path in (file, link):
        with pytest.raises(TempoError, match=f"--output {path} is read-only"):
            check_writable("--output", path)
    file.chmod(0o644)
    check_writable("--output", link)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TempoError, match="Permission denied"):
        check_writable("--output", tmp_path / "file")


def test_links_of_both_kinds_lead_to_the_same_file(tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("text")
    other.write_text("text")
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "soft").symlink_to(file)
    (tmp_path / "dangling").symlink_to("new")
    for name in ("hard", "soft", "./file"):
        assert same_file(tmp_path / name, file)
    assert not same_file(other, file)
    assert same_file(tmp_path / "dangling", tmp_path / "new")
    assert not same_file(tmp_path / "new", tmp_path / "newer")


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / ("é" * 120)
    write_atomically(path, "text")
    assert path.read_text() == "text"
