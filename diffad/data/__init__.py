"""Anomaly detection data sets, plain folders and Hub data sets, read into one record shape.

Every loader gives the same columns: `image`, `mask` (None for a good image and where there is no ground
truth), `label` (0 good, 1 defective), `category`, `defect` ("good" for a good image) and `path` (the image's
file, "" where there is none). An image is a file until its row is read: memory does not grow with pixels.

Layouts, by the name that forces one:

    mvtec_ad     CATEGORY/{train,test}/{good,DEFECT}/*, masks CATEGORY/ground_truth/DEFECT/*_mask.png
                 (or groundtruth, masks, mask, gt, annotations instead of ground_truth)
    mvtec_3d     CATEGORY/{train,validation,test}/{good,DEFECT}/rgb/*, masks in `gt` beside `rgb`
    btad         CATEGORY/{train,test}/{ok,ko}/*, masks CATEGORY/ground_truth/ko/*
    visa         CATEGORY/Data/Images/*; split_csv/1cls.csv lists the splits and masks
    uni_medical  CATEGORY/{train,test}/{good,Ungood}/*, masks CATEGORY/ground_truth/Ungood/* in the same
                 order; or meta.json lists everything
    mvtec_ad_2   CATEGORY/{train,validation}/good/*, CATEGORY/test_public/{good,bad}/*, masks
                 CATEGORY/test_public/ground_truth/bad/*_mask.png; the private tests have no labels
    mvtec_loco   as mvtec_ad, with a folder of masks for each image, CATEGORY/ground_truth/DEFECT/NAME/*.png
    real_iad     realiad_jsons/CATEGORY.json lists what is in realiad_1024/CATEGORY (or _512, _256, _raw)
    kolektor_sdd kos01/Part0.jpg, ..., masks kos01/Part0_label.bmp; split by items, as none is published
    kolektor_sdd_2  {train,test}/*.png, masks {train,test}/*_GT.png; of training, the good ones
    elpv         solar cells, from the installed package elpv-dataset (Deitsch et al., "Automatic
                 classification of defective photovoltaic module cells", 2019)
    folder       images, all of them good; or good/ and a folder for each defect, masks as in mvtec_ad
    hub          what `datasets.load_dataset` reads: Hub data sets, parquet, image folders with metadata (a
                 metadata.csv or metadata.jsonl with file_name and one of label, defect, category, mask_file_name)

A folder `good` may have another usual name: ok, normal, pass, defect_free, good_parts, ... (`diffad.data.records`).
So may those of the splits: training, testing, val, valid.
Where a folder has both `X.*` and `X_mask.*` (or `X_gt.*`), these are the masks of its images. Among good images
they are left out, with a warning.

MPDD and what else has MVTec-AD's folders is read as mvtec_ad. A folder may be a category itself (with train/ and
test/ in it): the category's name is then the folder's.
"""

from diffad.images import image_to_rgb
from diffad.installation import needs_extra

with needs_extra("train", "evaluate"):
    from diffad.data.checks import check_images
    from diffad.data.loading import load_anomaly_dataset
    from diffad.data.masks import mask_to_array, resize_image_and_mask
    from diffad.data.parts import check_part_pattern, halve_parts, part_index
    from diffad.data.records import FEATURES

__all__ = [
    "FEATURES",
    "check_images",
    "check_part_pattern",
    "halve_parts",
    "image_to_rgb",
    "load_anomaly_dataset",
    "mask_to_array",
    "part_index",
    "resize_image_and_mask",
]
