"""Diagnosis before and during training: the dry run, the teacher's pre-flight, gradients, non-finite levels."""
