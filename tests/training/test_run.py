import math

import pytest

from timm_spinal.training.run import Progress


def row(epoch, top1, loss=1., ema=None):
    values = dict(epoch=epoch, eval_top1=top1, eval_top5=99., eval_loss=loss)
    return values if ema is None else dict(values, ema_top1=ema, ema_top5=98., ema_loss=0.5)


def test_best_of_both_weights_and_first_of_equals():
    progress = Progress()
    assert progress.update_best(row(0, 50., ema=40.), 'top1') == 'model'
    assert progress.update_best(row(1, 50., ema=50.), 'top1') == ''
    assert progress.stale == 1
    assert progress.update_best(row(2, 51., ema=52.), 'top1') == 'ema'
    assert progress.stale == 0
    assert progress.best == dict(epoch=2, weights='ema', metric='top1', value=52., loss=0.5, top1=52., top5=98.)


def test_loss_counts_downwards():
    progress = Progress()
    assert [progress.update_best(row(i, 50., loss=loss), 'loss') for i, loss in enumerate((2., 3., 1.))] == [
        'model', '', 'model']


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_nan_is_never_the_best(bad):
    progress = Progress()
    assert progress.update_best(row(0, 90., loss=bad), 'top1') == '' and progress.best == {}
    assert progress.update_best(row(1, 10.), 'top1') == 'model'


def test_the_last_epoch_is_kept_where_it_is_asked_for():
    progress = Progress()
    assert [progress.update_best(row(epoch, top1), 'top1', keep='last')
            for epoch, top1 in enumerate((50., 40.))] == ['model'] * 2
    assert (progress.best['epoch'], progress.best['top1']) == (1, 40.)
    assert progress.update_best(row(2, 90., loss=math.nan), 'top1', keep='last') == '' and progress.best['epoch'] == 1


def test_end_of_epoch():
    progress = Progress(epoch=2, batch=5, sums=dict(loss=3., images=40.), epoch_seconds=4., eval_seconds=1.)
    assert progress.seconds == 5.
    progress.end_epoch(dict(epoch=2))
    assert (progress.epoch, progress.batch, progress.sums, progress.images) == (3, 0, {}, 40)
    assert progress.images_per_second == 10. and progress.seconds == 5. and progress.history == [dict(epoch=2)]
