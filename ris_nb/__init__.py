"""Referring image segmentation, notebook by notebook: the public names, each imported when it is first asked for."""
from importlib import import_module

__version__ = "0.2.0"

_ROOMS = {  # module -> what of it is public
    "contract": "Batch Output RISError",
    "registry": "create_model import_file list_models load_model register_model shipped_checkpoint",
    "settings": "nested",
    "checkpoint": "Checkpointed replacing",
    "metrics": "SegmentationMetrics intersection_union iou",
    "show": "draw_mask overlay show_referral",
    "data.shapes": "Scene Thing make_scene",
    "data.speaker": "Expression refer show_scene",
    "data.toys": "make_toys",
    "data.toy_speaker": "refer_toys",
    "data.writer": "make_refshapes make_reftoys",
    "data.pickles": "load_plain_pickle",
    "data.refer": "PUBLISHED ReferData Referral Referrals Sentence read_mask",
    "data.phrasecut": "PhraseCutData",
    "data.folder": "FolderData",
    "data.photo_phrases": "Instance",
    "data.photo_speaker": "describe_folder describe_instances mirror_sentence",
    "data.view_folders": "ViewCounts make_views",
    "data.sources": "open_data",
    "data.scenes": "open_scenes",
    "data.check": "check_data",
    "data.prepare": "prepare",
    "data.importing": "import_data",
    "data.tokenizer": "Tokenizer build_vocabulary read_vocabulary",
    "data.images": "read_image",
    "data.batches": "ReferralDataset Transform collate encode_item make_batch make_loader",
    "encoders.language": "TextEncoder",
    "encoders.vision": "Swin ViT",
    "encoders.pretraining": "pretrained_namer pretrained_tagger",
    "models.base": "RISModel evaluating",
    "models.layers": "dice_loss mask_loss score_masks upsample",
    "models.lavt": "LAVT LanguageGate LanguageSwin PWAM SimpleDecoder",
    "models.mask_grounding": "Grounded MaskGrounding WordPredictor mask_grounding_loss mask_words masked_word_accuracy",
    "models.alignment": "ImageAlignment LanguageAlignment alignment_loss",
    "models.mask_decoder": "DeformableAttention MaskDecoder PixelDecoder deformable_sample",
    "models.magnet": "LockStep MagNet",
    "models.rela": "ReLA",
    "models.entity_slots": "EntityDiscovery EntitySlots QuerySlots RandomSlots reconstruction_loss",
    "models.repainting": "SlotDecoder",
    "models.modality_fusion": "ModalityFusion relevance_map",
    "models.c3_loss": "c3_loss c3_similarity",
    "models.sag": "SaG relevance_masks",
    "models.rivals": "GroupViT MaskCLIP TSEG",
    "models.cris": "CRIS",
    "training.config": "TINY_RECIPE TrainConfig",
    "training.optim": "param_groups schedule_factor",
    "training.state": "read_log",
    "training.launch": "make_accelerator",
    "training.loop": "fit",
    "distributed": "sync_batchnorm",
    "evaluation.report": "Record Report bootstrap make_report score",
    "evaluation.evaluate": "evaluate shuffle_expressions",
    "evaluation.floors": "Floor",
    "evaluation.cases": "show_answers show_cases",
    "evaluation.probes": "find_changes",
    "evaluation.listening": "listen",
    "studies.runner": "run_study seed_interval show_study study_table",
    "studies.table": "STUDIES repeat_study",
    "recipes.recipe": "Recipe Setting plan read_recipe",
    "recipes.recipes": "RECIPES find_recipe list_recipes",
    "recipes.run": "RunSettings train",
    "recipes.expectation": "expectation",
    "recipes.published": "read_published results_markdown",
    "recipes.released": "released_model",
    "testing": "check_model",
}
_HOME = {name: module for module, names in _ROOMS.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
