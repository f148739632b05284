"""The folder of a run: where it is, which checkpoint in it is resumed, and that no other run writes there."""
import contextlib
import errno
import os
import socket
import time
from pathlib import Path
from typing import Any, ClassVar

from timm_spinal.errors import UserError

from .checkpoint import candidates, choose_checkpoint, find_checkpoints, is_checkpoint, read_state
from .config import RunOptions
from .resume_checks import changed_settings, check_same_run

LOCK = '.lock'
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_LOCKED_BYTE = 1 << 30  # beyond the text of the file, which Windows would not let others read otherwise


class Occupied(UserError):
    """The folder belongs to another run."""


def check_name(name: str, where: str) -> None:
    """Refuse what is not the name of a single folder.

    Args:
        name: As the user gave it.
        where: The option, for the message.

    Raises:
        UserError: Separators, '.' or '..', spaces at the ends, control characters, or too long a name.
    """
    wrong = ''
    if any(c in name for c in '/\\') or name in ('.', '..'):
        wrong = 'is a path, not a name; --output takes the folder around it'
    elif name != name.strip() or not name:
        wrong = 'begins or ends with a space, or is empty'
    elif not name.isprintable():
        wrong = 'has characters that cannot be printed'
    elif len(os.fsencode(name)) > 200:
        wrong = 'is too long; use at most 200 bytes'
    if wrong:
        raise UserError(f'{where} {name!r}: {wrong}; use a single name, for instance first-run')


def claim_run_folder(
        config: RunOptions,
        name: str,
        description: dict[str, Any],
        held: contextlib.ExitStack,
) -> tuple[Path, Path | None]:
    """The run folder, locked, and the checkpoint to go on from, None for a new run. For the main process.

    Args:
        config: The run's config.
        name: What a run without ``experiment`` is called, after the time.
        description: Config and data, as checkpoints hold them.
        held: Unlocks the folder.

    Raises:
        UserError: A name that is none, a folder in which another run is going on or was, a checkpoint that is missing,
            damaged or of another run. Nothing is written.
    """
    if config.resume and config.resume != 'auto':
        candidates(config.resume)
    folder = _lock_run_folder(config, name, held)
    checkpoint = choose_checkpoint(config.resume, folder, print) if config.resume else None
    if checkpoint is not None:
        check_same_run(read_state(checkpoint), description, str(checkpoint), type(config))
    return folder, checkpoint


def _lock_run_folder(config: RunOptions, name: str, held: contextlib.ExitStack) -> Path:
    while True:
        folder = run_folder(config, name)
        lock = FolderLock(folder)
        try:
            lock.acquire()
            check_free(config, folder)
        except Occupied:
            lock.release()
            if config.experiment or config.resume:
                raise
            continue  # another run took this name a moment before
        except UserError:
            lock.release()
            raise
        held.callback(lock.release)
        return folder


def begun_on_device(config: RunOptions) -> bool | None:
    """Whether the training images of a run that is resumed were augmented on the device; None for a new run."""
    for checkpoint in find_checkpoints(run_folder(config, '') / 'last') if config.resume else []:
        with contextlib.suppress(UserError, ValueError, OSError):  # damaged: an older one will be resumed
            return bool(read_state(checkpoint).get('augmented_on_device', False))
    return None


def changed_since_checkpoint(config: RunOptions) -> dict[str, str] | None:
    """Settings that differ from those of the newest checkpoint of a run that is resumed; None where there is none."""
    checkpoints = find_checkpoints(run_folder(config, '') / 'last') if config.resume else []
    if not checkpoints:
        return None
    saved = read_state(checkpoints[0])
    return changed_settings(saved['config'], vars(config), saved.get('cwd', ''), type(config))


def run_folder(config: RunOptions, name: str) -> Path:
    """Folder of a run: ``output/experiment``, or that of the run which is resumed. Nothing is created.

    Args:
        config: The run's config.
        name: What a run without ``experiment`` is called, after the time.

    Raises:
        UserError: ``--resume auto`` without a name, or a name that is none.
    """
    if config.experiment:
        check_name(config.experiment, '--experiment')
    parent = Path(config.output or 'output/train').absolute()
    if config.resume == 'auto' and not config.experiment:
        raise UserError('--resume auto: does not say which run; add --experiment NAME, or give the run folder in '
                        'place of auto')
    if config.resume and not config.experiment:
        return resumed_folder(config.resume)
    if not config.experiment:
        return _unused(parent / f'{time.strftime("%Y%m%d-%H%M%S")}-{name}')
    return parent / config.experiment


def resumed_folder(resume: str) -> Path:
    """The run folder that ``--resume`` names, by itself or by one of its checkpoints."""
    path = Path(resume).absolute()
    return path.parents[1] if is_checkpoint(path) else path


def check_free(config: RunOptions, folder: Path) -> None:
    """Refuse a folder that holds another run than the one that is resumed.

    Raises:
        Occupied: It does.
    """
    resumed = resumed_folder(config.resume) if config.resume not in ('', 'auto') else folder
    if config.resume and os.path.realpath(resumed) == os.path.realpath(folder):
        return
    if find_checkpoints(folder / 'last') or (folder / 'result.json').exists():
        advice = f'to go on in {resumed} leave out --experiment' if config.resume else 'continue with --resume auto'
        raise Occupied(f'run folder {folder}: it contains a run already; {advice}, or choose another --experiment')


def _unused(folder: Path) -> Path:
    """The folder, or its first free sister, for runs that start in the same second."""
    count, free = 1, folder
    while free.exists():
        count += 1
        free = folder.with_name(f'{folder.name}-{count}')
    return free


class FolderLock:
    """Holds a folder for this process, from `acquire` to `release`; other processes are refused.

    The lock is one of the operating system on ``.lock`` in the folder, which names its holder. It ends with the
    process that holds it, however that ends, and loader workers do not inherit it. `release` removes the file, and
    the folders that `acquire` made where nothing was written into them. A second lock of the same process on the folder
    does nothing.
    """
    held: ClassVar[set[tuple[int, str]]] = set()  # with the process, since a forked one holds nothing

    def __init__(self, folder: Path):
        self.folder = Path(folder).absolute()
        self._file: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Make the folder where it is not there, and lock it.

        Raises:
            Occupied: Another process holds it.
            UserError: The folder cannot be made or written.
        """
        if self._key() in self.held:
            return
        self._made = []
        try:
            for _ in range(1000):  # once, unless another process removes it at the same time
                self._make_folder()
                with contextlib.suppress(FileNotFoundError):
                    self._file = self._try()
                if self._file is not None:
                    self.held.add(self._key())
                    return
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        except OSError as e:
            self._remove_made()
            raise UserError(f'folder {self.folder}: {e.strerror}; choose another --output') from e
        except BaseException:
            self._remove_made()
            raise

    def release(self) -> None:
        """Let others have the folder."""
        if self._file is None:
            return
        path = self.folder / LOCK
        if os.name == 'nt':  # which does not remove open files
            os.close(self._file)
            path.unlink(missing_ok=True)
        else:  # while it is held: nobody else's is removed
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(self._file)
        self._file = None
        self.held.discard(self._key())
        self._remove_made()

    def __enter__(self) -> 'FolderLock':
        self.acquire()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.release()

    def _key(self) -> tuple[int, str]:
        return os.getpid(), os.path.realpath(self.folder)

    def _make_folder(self) -> None:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = [p for p in missing if p not in self._made] + self._made

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # not empty
            for path in self._made:
                path.rmdir()

    def _try(self) -> int | None:
        """The locked file; None where its last holder removed it in the meantime."""
        path = self.folder / LOCK
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file):
                raise Occupied(f'folder {self.folder}: a run is going on there ({_holder(file)}); wait for it, or '
                               'choose another --experiment or --output')
            if not os.path.samestat(os.fstat(file), os.stat(path)):
                os.close(file)
                return None
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
        except BaseException:
            os.close(file)
            raise
        return file


def _lock(file: int) -> bool:
    """Lock a file; False where another process has it. A file system without locks counts as locked, with a warning."""
    try:
        if os.name == 'nt':
            import msvcrt
            os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a forked process would keep
    except OSError as e:
        if e.errno in _BUSY:
            return False
        if e.errno not in _NO_LOCKS:
            raise
        print('warning: the file system of the run folder has no locks, so a second run in it would not be noticed',
              flush=True)
    return True


def _holder(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    lines = os.read(file, 200).decode(errors='replace').splitlines()
    return lines[0] if lines else 'another process'
