"""Calls a plugin library without TensorRT: its contract on any machine, its kernels emulated or on a GPU.

python -m cm_export.plugins.harness --library artifacts/plugins/libcm_plugins.so --device cuda
"""
