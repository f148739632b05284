"""The options of the trainer, in the groups of timm's ``train.py``, and the configs that are made of them.

A field is a flag and a YAML key. Its name is timm's argparse ``dest`` wherever timm has the option, and its default is
timm's unless the help text gives the reason. `option` says what its arguments mean.
"""
import os
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from .options import Options, option

SCHEDULERS = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'constant', 'wsd', 'rsqrt', 'plateau', 'none')
LOSSES = ('ce', 'bce', 'asl', 'poly', 'margin', 'squared_hinge', 'mse', 'l1')
BESIDE = 'beside'  # value of a bare --kd-cache
AUG, WLD = 'no_aug=false', 'kd_distill_type=wld'  # what options require


@dataclass
class DataOptions(Options, applies_to=('training', 'validation', 'frozen')):
    """Data set"""
    data_dir: str = option(
        '', 'folder or .tar file with the images; for torch/, hfds/ and tfds/ sources: the folder of their files',
        path=True, on_resume='fixed')
    dataset: str = option(
        '', 'source of the images: digits, multimnist (made of the MNIST files in --data-dir), torch/NAME, hfds/NAME, '
        'hfids/NAME, wds/NAME or tfds/NAME; numbers in place of images: regression/sum, regression/sin_sum, '
        'regression/product, regression/sin_product, or regression for the table --data-dir FILE.csv; '
        'not given: the images in --data-dir', on_resume='fixed')
    train_split: str = option('train', 'name of the training split', on_resume='fixed')
    val_split: str = option(
        'validation', 'name of the evaluation split, which chooses the best epoch', on_resume='fixed')
    val_split_fraction: float = option(
        0., 'use this part of the training split, stratified by class and fixed by --seed, in place of --val-split; '
        'for data sets that have only a training and a test split', low=0., high=0.9, on_resume='fixed')
    test_split: str = option('', 'split that is evaluated once, at the end, with the weights that the run keeps')
    train_num_samples: int | None = option(
        None, 'number of training images, needed for streamed sources; for multimnist any number of pairs', low=1,
        applies_to=('training',), not_frozen='streamed sources cannot be split', on_resume='fixed')
    val_num_samples: int | None = option(
        None, 'number of evaluation images, needed for streamed sources; for multimnist any number of pairs, in the '
        'test split too', low=1, applies_to=('training', 'validation'), not_frozen='streamed sources cannot be split')
    dataset_download: bool = option(
        False, 'allow torch/ and tfds/ sources and multimnist to download', on_resume='silent')
    dataset_trust_remote_code: bool = option(
        False, 'let hfds/ and hfids/ run code from the data set repository', recipe=False)
    class_map: str = option('', 'file that maps class names to indices', on_resume='fixed', path=True)
    input_img_mode: str | None = option(
        None, "Pillow mode of the images; not given: 'L' for a model with one input channel, else 'RGB'; 16-bit grey "
        'is scaled to 8 bits, and transparent parts become white if the mode has no transparency')
    exif_transpose: bool = option(
        False, 'rotate images upright by their EXIF orientation; without it they are used as stored, as in timm')
    input_key: str | None = option(None, 'name of the image field (hfds/, hfids/, wds/)')
    target_key: str | None = option(None, 'name of the label field (hfds/, hfids/, wds/)')
    skip_unreadable: bool = option(
        False, 'do not stop at an image that cannot be read: training replaces it, evaluation leaves it out, and the '
        'result has their number (timm always replaces them)')
    data_on_device: str = option(
        'auto', 'keep the images decoded on the device: auto (a split that fits, and whose augmentation the device can '
        'do; the others go through the loader), always (or stop) or never', choices=('auto', 'always', 'never'),
        applies_to=('training',), not_frozen='features are made once')


@dataclass
class NetworkOptions(Options, applies_to=('training', 'validation', 'frozen')):
    """Model"""
    model: str = option(
        'resnet50', 'name of the model: any of timm or timm_spinal', flags=('-m',), on_resume='fixed',
        applies_to=('training', 'validation'), not_frozen='the model is the --backbone')
    pretrained: bool = option(False, 'start from the pretrained weights of this name')
    pretrained_path: str | None = option(
        None, 'start from the weights in this file; if its classifier does not fit, the classifier is new', path=True)
    initial_checkpoint: str = option(
        '', 'start from the weights in this file, which must fit the whole model', path=True)
    num_classes: int | None = option(
        None, 'number of classes; not given: that of the data set (timm: that of the model)', low=1, on_resume='fixed',
        applies_to=('training', 'validation'), not_frozen='the classes come from the data')
    gp: str | None = option(None, 'global pooling: avg, max, avgmax, catavgmax, fast', on_resume='fixed')
    channels_last: bool = option(False, 'channels-last memory layout')
    model_kwargs: dict[str, Any] = option(
        {}, 'further model arguments as key=value, for instance head_width=256', on_resume='fixed')
    torchcompile: str | None = option(
        None, 'compile with this backend', const='inductor', applies_to=('training', 'validation'),
        not_frozen='features are made without compilation')
    torchcompile_mode: str | None = option(
        None, 'mode of torch.compile', applies_to=('training', 'validation'),
        not_frozen='features are made without compilation')
    bn_eps: float | None = option(None, 'BatchNorm epsilon', low=0.)


@dataclass
class InputOptions(Options, applies_to=('training', 'validation', 'frozen')):
    """Images as the model takes them"""
    img_size: int | None = option(None, 'image side in pixels', low=8, on_resume='fixed')
    in_chans: int | None = option(
        None, 'number of input channels; not given: that of the model (timm: 3)', low=1, on_resume='fixed')
    input_size: list[int] | None = option(
        None, 'channels, height and width, for instance 3 224 224', nargs=3, on_resume='fixed')
    crop_pct: float | None = option(
        None, 'centre crop of the evaluation images, as a part of the side', low=0.01, high=4.)
    crop_mode: str | None = option(None, 'crop of the evaluation images', choices=('squash', 'border', 'center'))
    mean: list[float] | None = option(None, 'mean of the pixels, one per channel or one for all')
    std: list[float] | None = option(None, 'standard deviation of the pixels', greater_than=0.)
    interpolation: str = option('', 'interpolation of the evaluation images')


@dataclass
class TrainedModelOptions(Options, applies_to=('training',), not_frozen='the backbone is not trained'):
    """Model in training"""
    grad_checkpointing: bool = option(False, 'recompute activations in the backward pass, to save memory')
    head_init_scale: float | None = option(
        None, 'multiply the initial weights of the classifier', not_frozen='the heads keep their own initial weights')
    head_init_bias: float | None = option(
        None, 'initial bias of the classifier', not_frozen='the heads keep their own initial weights')
    drop: float = option(0., 'dropout of the backbone', low=0., high=1.)
    drop_path: float | None = option(None, 'stochastic depth', low=0., high=1.)
    drop_block: float | None = option(None, 'drop block', low=0., high=1.)
    bn_momentum: float | None = option(None, 'BatchNorm momentum', low=0., high=1.)
    freeze: str = option(
        'none', 'what is not trained: backbone (all but the head), backbone-except-bn (all but the head and '
        'BatchNorm), bn (BatchNorm of the backbone)', choices=('none', 'backbone', 'backbone-except-bn', 'bn'),
        on_resume='fixed')
    freeze_epochs: int = option(
        0, 'number of first epochs in which only the head trains; the backbone keeps its weights and its BatchNorm '
        'statistics', low=0)
    freeze_modules: list[str] = option(
        [], 'further modules that are not trained, by their names in named_modules(), for instance layer4.2; their '
        'BatchNorm statistics stay as well', on_resume='fixed')


@dataclass
class ModelOptions(TrainedModelOptions, InputOptions, NetworkOptions):
    """All options of the model."""


@dataclass
class LoaderOptions(Options):
    """Batches and workers"""
    batch_size: int = option(128, 'training images per process and step', low=1, flags=('-b',), on_resume='fixed')
    validation_batch_size: int | None = option(
        None, 'evaluation images per process and step', low=1, flags=('-vb',), on_resume='silent')
    workers: int = option(
        min(4, os.cpu_count() or 1), 'data loader workers of each process; not given: 4, or the number of cores where '
        'that is less; 0: the process loads the images itself', low=0, flags=('-j',), on_resume='silent', recipe=False)
    pin_mem: bool = option(False, 'pin memory of the batches', on_resume='silent', recipe=False)
    seed: int = option(42, 'random seed', low=0, high=2 ** 32 - 1, on_resume='fixed')
    mixed_precision: str | None = option(
        None, "as 'accelerate launch --mixed_precision'; not given: as accelerate is configured",
        choices=('no', 'fp16', 'bf16', 'fp8'))
    debug: bool = option(False, 'show the traceback of an error', on_resume='silent', recipe=False)


@dataclass
class DeviceOptions(Options, applies_to=('training', 'detection')):
    """Devices and processes"""
    matmul_precision: str = option(
        'high', "torch's precision of float32 products on a GPU; 'high' is TF32, as in timm; 'highest' is float32",
        choices=('highest', 'high', 'medium'))
    no_ddp_bb: bool = option(
        False, 'several processes: do not copy the buffers of the first one (BatchNorm statistics) before each forward '
        'pass')
    ddp_static_graph: bool = option(
        False, 'several processes: tell DistributedDataParallel that every update uses the same weights in the same '
        'way, which saves time and memory; not with --grad-accum-steps', recipe=False, on_resume='silent')


@dataclass
class OptimizerOptions(Options, applies_to=('training', 'detection')):
    """Optimizer"""
    opt: str = option('sgd', 'optimizer, any of timm', on_resume='fixed')
    opt_eps: float | None = option(None, 'epsilon of the optimizer', low=0.)
    opt_betas: list[float] | None = option(None, 'betas of the optimizer', low=0., high=1.)
    momentum: float = option(0.9, 'momentum', low=0.)
    weight_decay: float = option(2e-5, 'weight decay', low=0.)
    opt_kwargs: dict[str, Any] = option({}, 'further optimizer arguments as key=value')
    clip_grad: float | None = option(None, 'clip gradients at this value', low=0.)
    clip_mode: str = option('norm', 'how gradients are clipped', choices=('norm', 'value', 'agc'))
    layer_decay: float | None = option(
        None, 'factor of the learning rate from each layer to the one below it', low=0., high=1., on_resume='fixed')
    layer_decay_min_scale: float = option(0., 'lower bound of the scale that layer decay gives a layer', low=0.)
    layer_decay_no_opt_scale: float | None = option(None, 'do not train layers with a lower scale than this', low=0.)
    grad_accum_steps: int = option(1, 'batches per update', low=1, on_resume='fixed')


@dataclass
class ScheduleOptions(Options, applies_to=('training', 'detection')):
    """Learning rate schedule"""
    sched: str = option('cosine', 'schedule', choices=SCHEDULERS)
    sched_on_updates: bool = option(False, 'step the schedule at every update instead of every epoch')
    lr: float | None = option(None, 'learning rate; not given: lr_base scaled by the global batch size', low=0.)
    lr_base: float = option(0.1, 'learning rate of a batch of lr_base_size images', low=0.)
    lr_base_size: int = option(256, 'batch size that lr_base is for', low=1)
    lr_base_scale: str = option(
        '', 'scaling of lr_base with the batch; empty: by the optimizer',
        choices=('', 'linear', 'sqrt'))
    lr_noise: list[float] | None = option(
        None, 'start, or start and end, of learning rate noise, as parts of the run', low=0., high=1., ascending=True)
    lr_noise_pct: float = option(0.67, 'limit of the noise', low=0.)
    lr_noise_std: float = option(1., 'standard deviation of the noise', low=0.)
    lr_cycle_mul: float = option(1., 'length factor from cycle to cycle', greater_than=0.)
    lr_cycle_decay: float = option(0.5, 'learning rate factor from cycle to cycle', low=0.)
    lr_cycle_limit: int = option(1, 'number of cycles', low=1)
    lr_k_decay: float = option(1., 'k-decay of cosine and poly', greater_than=0.)
    lr_decay_fn: str | None = option(None, 'shape of the decay of wsd and rsqrt')
    lr_stable_timescale: float | None = option(None, 'time scale of rsqrt in epochs')
    warmup_lr: float = option(1e-5, 'learning rate at the start of the warm-up', low=0.)
    min_lr: float = option(0., 'lowest learning rate', low=0.)
    epochs: int = option(300, 'number of epochs', low=1, on_resume='silent', changes_result=True)
    epoch_repeats: float = option(0., 'number of passes over the training set in an epoch; 0: one', low=0.)
    min_updates: int = option(
        0, 'least number of updates of the run: if there are few images, an epoch repeats them; not for streamed '
        'sources', low=0)
    decay_milestones: list[int] = option([90, 180, 270], 'epochs at which multistep decays', low=0, ascending=True)
    decay_epochs: float | None = option(
        None, 'epochs between decays; not given: 90, for wsd and rsqrt the last fifth',
        low=0.)
    warmup_epochs: int = option(5, 'epochs of warm-up', low=0)
    warmup_prefix: bool = option(
        False, 'add the warm-up epochs in front of the schedule; without it they are part of it')
    cooldown_epochs: int = option(0, 'number of last epochs at the lowest learning rate', low=0)
    patience_epochs: int = option(10, 'epochs without improvement before plateau decays', low=0)
    decay_rate: float = option(0.1, 'factor of a decay', low=0., flags=('--dr',))


@dataclass
class AugmentOptions(Options, applies_to=('training', 'frozen')):
    """Augmentation"""
    no_aug: bool = option(False, 'no training augmentation at all')
    train_crop_mode: str | None = option(
        None, 'random crop: rrc (random resized), rkrc or rkrr (keep the ratio)',
        choices=('rrc', 'rkrc', 'rkrr'), requires=(AUG,))
    pad_crop: int | None = option(
        None, 'pad the images with this number of black pixels and crop them to the input size at random, in place of '
        'the random resized crop; 4 is usual for images of 32 pixels', low=1, requires=(AUG,))
    scale: list[float] = option(
        [0.08, 1.0], 'smallest and largest area of the random crop, as a part of the image', nargs=2, greater_than=0.,
        high=1., ascending=True, requires=(AUG,))
    ratio: list[float] = option(
        [3. / 4., 4. / 3.], 'smallest and largest aspect ratio of the random crop', nargs=2, greater_than=0.,
        ascending=True, requires=(AUG,))
    hflip: float = option(0.5, 'probability of a horizontal flip', low=0., high=1., requires=(AUG,))
    vflip: float = option(0., 'probability of a vertical flip', low=0., high=1., requires=(AUG,))
    rotation: float = option(
        0., 'random rotation of up to this many degrees (torchvision RandomRotation)', low=0.,
        high=180., requires=(AUG,))
    perspective: float = option(
        0., 'probability of torchvision RandomPerspective, distortion 0.5', low=0., high=1., requires=(AUG,))
    color_jitter: float | None = option(
        0.4, 'strength of colour jitter; most --aa policies replace it', low=0., requires=(AUG,))
    color_jitter_prob: float | None = option(None, 'probability of colour jitter', low=0., high=1., requires=(AUG,))
    grayscale_prob: float | None = option(None, 'probability of grey images', low=0., high=1., requires=(AUG,))
    gaussian_blur_prob: float | None = option(None, 'probability of a blur', low=0., high=1., requires=(AUG,))
    aa: str | None = option(
        None, 'AutoAugment policy: rand-m9-mstd0.5, augmix-m3, original, v0, 3a, ...', requires=(AUG,))
    aug_repeats: float = option(
        0, 'repeated augmentation: number of copies of an image in a pass, each augmented differently; the number of '
        'images in an epoch stays the same', low=0,
        applies_to=('training',), not_frozen='features are made of single images', requires=(AUG,))
    reprob: float = option(0., 'probability of random erasing', low=0., high=1., requires=(AUG,))
    remode: str = option('pixel', 'filling of random erasing', choices=('pixel', 'rand', 'const'))
    recount: int = option(1, 'number of rectangles of random erasing', low=1)
    train_interpolation: str = option('random', 'interpolation of the training images')


@dataclass
class MixOptions(Options, applies_to=('training',), not_frozen='features are made of single images'):
    """Mixup and CutMix"""
    mixup: float = option(0., 'mixup alpha', low=0.)
    cutmix: float = option(0., 'cutmix alpha', low=0.)
    cutmix_minmax: list[float] | None = option(
        None, 'smallest and largest cutmix ratio, overrides alpha', nargs=2, low=0., high=1., ascending=True)
    mixup_prob: float = option(1., 'probability of mixing a batch', low=0., high=1.)
    mixup_switch_prob: float = option(0.5, 'probability of cutmix when both are on', low=0., high=1.)
    mixup_mode: str = option('batch', 'mix per batch, pair or element', choices=('batch', 'pair', 'elem'))
    mixup_off_epoch: int = option(0, 'epoch from which on images are not mixed; 0: never', low=0)


@dataclass
class ObjectiveOptions(Options, applies_to=('training',)):
    """Loss"""
    loss: str | None = option(
        None, 'loss of timm.loss.create_classification_loss, or margin or squared_hinge, which are for the scores of '
        'capsule heads, or mse or l1, which are for numbers (--dataset regression/...); not given: ce, or mse for '
        'numbers',
        choices=LOSSES)
    smoothing: float = option(0.1, 'label smoothing', low=0., high=1.)
    bce_loss: bool = option(False, 'the same as --loss bce')
    bce_sum: bool = option(False, 'sum the bce loss over the classes')
    bce_target_thresh: float | None = option(None, 'threshold that makes mixed targets binary', low=0., high=1.)
    bce_pos_weight: float | None = option(None, 'weight of the positive term of bce', low=0.)
    asl_gamma_pos: float = option(1., 'focusing of positives of asl', low=0.)
    asl_gamma_neg: float = option(4., 'focusing of negatives of asl', low=0.)
    poly_epsilon: float = option(2., 'Poly-1 coefficient')
    sb_ortho: float = option(0., 'weight of the orthogonality penalty on shared filter bases; 10 in the paper', low=0.)
    sb_ortho_mode: str = option(
        'official', 'official: mean over all stages, as in the paper; stage: sum over the stages, which is stronger '
        'against weight decay', choices=('official', 'stage'))


@dataclass
class DistillOptions(Options, applies_to=('training',)):
    """Distillation and warm start"""
    kd_model_name: str | None = option(
        None, 'teacher: a name, hf-hub:ORG/NAME, local-dir:FOLDER or the folder of a run', on_resume='fixed', path=True)
    kd_distill_type: str = option(
        'logit', 'kind of distillation; wld is weak logit distillation',
        choices=('logit', 'feature', 'token', 'wld'), on_resume='fixed')
    kd_loss_type: str | None = option(
        None, 'distance of logits; not given: mse for wld, kl for logit', choices=('kl', 'mse'))
    kd_temperature: float = option(4., 'temperature of kl', low=0.01)
    distill_loss_weight: float | None = option(
        None, 'weight of the distillation loss; for wld the first one, before it fades: 1 for mse, 0.5 for kl', low=0.)
    task_loss_weight: float | None = option(None, 'weight of the classification loss; not for wld', low=0.)
    kd_student_feature_dim: int | None = option(None, 'width of the student features', low=1)
    kd_teacher_feature_dim: int | None = option(None, 'width of the teacher features', low=1)
    kd_token_distill_type: str = option('soft', 'kind of token distillation', choices=('soft', 'hard'))
    kd_fade: str = option(
        'linear', 'how the weight of wld changes: linear (falls to 0), step (stays, then 0) or constant (stays to the '
        'end of the run)', choices=('linear', 'step', 'constant'), requires=(WLD,))
    kd_fade_end: float = option(
        0.5, 'part of the run, in (0, 1], after which the weight is 0 with linear and step', requires=(WLD,))
    kd_right_only: bool = option(False, 'use wld only on images that the teacher classifies correctly', requires=(WLD,))
    kd_two_stage: bool = option(
        False, 'use wld in two stages: first only the distillation loss, then only the classification loss',
        requires=(WLD,))
    kd_renormalize: bool = option(
        False, "convert the images to the teacher's mean and std, if it has others (wld; timm's kinds always do)",
        requires=(WLD,))
    kd_check: float | None = option(
        None, 'evaluate the teacher before the training, and stop if its top-1 in percent is lower than this; without '
        'a value: if it is no better than chance', low=0., high=100., const=0., on_resume='silent',
        requires=('kd_model_name',))
    kd_cache: str | None = option(
        None, "keep the teacher's logits of the training images in this folder, for wld with --no-aug; without a "
        'value: teacher-logits beside the run folder', const=BESIDE, path=True, requires=('kd_model_name', WLD))
    ic_warm_start: float | None = option(
        None, 'for a model with inter-layer collision that starts from the weights of a plain model: before the '
        "training, choose w' so that the collision is active at this part of the positions, and estimate the BatchNorm "
        'statistics again; without a value: 0.01', low=0.0001, high=0.9999, const=0.01)


@dataclass
class AverageOptions(Options, applies_to=('training', 'detection')):
    """Weight averaging and BatchNorm across processes"""
    model_ema: bool = option(False, 'keep a moving average of the weights and evaluate it', on_resume='fixed')
    model_ema_force_cpu: bool = option(False, 'keep the average on the CPU')
    model_ema_decay: float = option(0.9998, 'decay of the average', low=0., high=1.)
    model_ema_warmup: bool = option(False, 'warm the decay up')
    sync_bn: bool = option(False, 'BatchNorm over all processes')
    dist_bn: str = option('reduce', 'share BatchNorm statistics after each epoch', choices=('', 'broadcast', 'reduce'))


@dataclass
class RunOptions(Options, applies_to=('training', 'detection')):
    """Run folder, evaluation and checkpoints"""
    output: str = option('', 'folder for runs; not given: output/train', on_resume='silent', recipe=False)
    experiment: str = option(
        '', 'name of the run folder; not given: date, model and image size', on_resume='silent', recipe=False)
    resume: str = option(
        '', "continue this run: 'auto' (the run folder of --experiment), a run folder or a checkpoint",
        on_resume='silent', recipe=False)
    eval_metric: str = option(
        'top1', 'metric of the best epoch; exact, digit and top2 are those of multimnist, where top1 means exact; mse '
        'and r2 are those of regression, where top1 means r2',
        choices=('top1', 'top5', 'loss', 'exact', 'digit', 'top2', 'mse', 'r2'))
    keep: str = option(
        'best', 'epoch whose weights the run keeps: the best one by --eval-metric on the validation images, or the '
        'last one, if there are too few of these images to choose by', choices=('best', 'last'))
    val_interval: int = option(1, 'evaluate after every N epochs', low=1)
    stop_epoch: int | None = option(
        None, 'stop after this many epochs; the schedule stays that of --epochs', low=1, on_resume='silent',
        changes_result=True)
    early_stop_patience: int = option(
        0, 'stop after this number of evaluations without a better metric; 0: never', low=0, on_resume='silent',
        changes_result=True)
    checkpoint_steps: int = option(
        0, 'also write a checkpoint after every N updates; 0: only after each epoch', low=0, on_resume='silent',
        recipe=False)
    checkpoint_hist: int = option(
        2, 'number of checkpoints that are kept (timm: 10; ours have the whole state of the run)', low=1,
        on_resume='silent', recipe=False)
    log_interval: int = option(50, 'updates between log values', low=1, on_resume='silent', recipe=False)
    log_with: list[str] = option(
        [], 'trackers of accelerate: tensorboard, wandb, trackio, mlflow, ...', on_resume='silent', recipe=False)


# the last base is the first group of fields
@dataclass
class LoopConfig(RunOptions, AverageOptions, ScheduleOptions, OptimizerOptions, DeviceOptions, LoaderOptions):
    """What the loop depends on, whatever it trains."""


@dataclass
class TrainConfig(
        LoopConfig,
        DistillOptions,
        ObjectiveOptions,
        MixOptions,
        AugmentOptions,
        ModelOptions,
        DataOptions,
        command='training',
):
    """Everything that a training run depends on, under the names of timm's ``train.py``."""


@dataclass
class ValidateConfig(LoaderOptions, ModelOptions, DataOptions, command='validation'):
    """Validation"""
    val_split: str = option('validation', 'name of the split to evaluate', flags=('--split',))
    val_num_samples: int | None = option(
        None, 'number of images in the split, needed for streamed sources; for multimnist any number of pairs', low=1,
        flags=('--num-samples',))
    checkpoint: str = option('', 'run folder, checkpoint folder or weights file to evaluate')
    use_ema: bool = option(False, 'evaluate the moving average of the weights')
    crops: int = option(
        1, 'number of crops of each image: 1, or 10 (the corners, the centre and their mirror images), whose '
        'probabilities are averaged', choices=(1, 10))
    tta: str = option(
        '', 'test-time augmentation: flip averages the probabilities of each image and its mirror image',
        choices=('', 'flip'))
    results_file: str = option('', 'write the result to this .json or .csv file')
    report: str = option(
        '', 'write what a single model gets wrong into this folder: report.html, confusion matrix, worst images, '
        'precision and recall of each class, calibration, predictions')


def to_yaml(config: Options) -> str:
    """The whole config as YAML (``args.yaml``); `parse_config` reads it back to an equal config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, default_flow_style=None)
