"""The work of the stages: classes for the trainer (align, distill, finetune), functions for select, scale and eval.

Transfer is `halo.models.make_twins`; `halo.conversion` runs the stages in order.
"""
