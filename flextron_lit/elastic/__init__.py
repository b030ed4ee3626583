"""The elastic network: conversion in place, elastic modules, families, importance."""

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock
from flextron_lit.elastic.extraction import extract
from flextron_lit.elastic.selection import ActiveSelection, Policy, Selection
