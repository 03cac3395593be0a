"""Makes NIfTI images in odd orientations with nibabel, and judges the masks made from them.

    nifti_peer.py make FOLDER        FOLDER/{images,labels,new,truth}
    nifti_peer.py judge FOLDER OUT   OUT/*.nii.gz against FOLDER/new and FOLDER/truth

Nothing of cpcr is used: what nibabel says counts.
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine


def rotation(x, z):
    x, z = np.radians([x, z])
    about_x = [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]]
    about_z = [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]]
    return np.array(about_z) @ np.array(about_x)


def affine(matrix, origin):
    return np.vstack([np.column_stack([matrix, origin]), [0, 0, 0, 1]])


def orientations():
    """Name, shape, affine and how voxels are stored. The thick axis is the third, the first, the second."""
    fine, thick = 1.5, 8.0
    plain = np.diag([fine, fine, thick])
    oblique = rotation(20, 15) @ plain
    sagittal = np.array([[0, 0, -fine], [0, -fine, 0], [thick, 0, 0]])
    coronal = np.array([[0, thick, 0], [0, 0, fine], [-fine, 0, 0]])
    return [
        ("ras", (36, 28, 5), affine(plain, [-20, -30, 40]), np.float32),
        ("lps", (28, 36, 5), affine(np.diag([-1, -1, 1]) @ plain, [70, 60, -10]), np.float32),
        ("oblique", (36, 28, 5), affine(oblique, [5, -60, 12]), np.float32),
        ("scaled", (36, 28, 5), affine(oblique @ np.diag([1, -1, 1]), [9, 8, 7]), np.int16),
        ("sagittal", (5, 36, 28), affine(sagittal, [30, 20, 10]), np.uint8),
        ("coronal", (28, 5, 36), affine(coronal, [-3, -2, -1]), np.float64),
    ]


def image_and_label(rng, shape, spacing):
    """A bright brick off the centre, longer one way than the other, with a notch on the far side."""
    thick = int(np.argmax(spacing))
    first, second = [axis for axis in range(3) if axis != thick]
    label = np.zeros(shape, np.uint8)
    a, b = rng.integers(3, 6), rng.integers(4, 7)
    brick = [slice(None)] * 3
    brick[first], brick[second], brick[thick] = slice(a, a + 13), slice(b, b + 8), slice(1, 3)
    label[tuple(brick)] = 1
    notch = list(brick)
    notch[first], notch[second] = slice(a + 8, a + 13), slice(b + 4, b + 8)
    label[tuple(notch)] = 0
    noise = rng.uniform(0, 30, shape)
    return noise + 200.0 * label, label


def save(path, values, matrix, kind):
    if kind == np.int16:
        # Stored as whole numbers with a slope and an intercept, as scanners do.
        stored = nib.Nifti1Image(np.round((values + 50.0) / 0.25).astype(np.int16), matrix)
        stored.header.set_slope_inter(0.25, -50.0)
    else:
        stored = nib.Nifti1Image(values.astype(kind), matrix)
    stored.set_sform(matrix, 1)
    stored.set_qform(matrix, 2)
    stored.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(stored, path)


def make(folder):
    rng = np.random.default_rng(7)
    for name, shape, matrix, kind in orientations():
        spacing = np.sqrt((matrix[:3, :3] ** 2).sum(0))
        for number in range(3):
            values, label = image_and_label(rng, shape, spacing)
            images, labels = ("images", "labels") if number < 2 else ("new", "truth")
            save(folder / images / f"{name}{number}.nii.gz", values, matrix, kind)
            save(folder / labels / f"{name}{number}.nii.gz", label, matrix, np.uint8)


def centre(image):
    return apply_affine(image.affine, np.argwhere(np.asanyarray(image.dataobj) == 1).mean(0))


def judge(folder, out):
    names = sorted(path.name for path in (folder / "new").iterdir())
    assert names and names == sorted(p.name for p in out.iterdir() if "_prob" not in p.name), names
    for name in names:
        image, mask = nib.load(folder / "new" / name), nib.load(out / name)
        truth = nib.load(folder / "truth" / name)
        assert mask.shape == image.shape, (name, mask.shape, image.shape)
        assert np.array_equal(mask.affine, image.affine), (name, mask.affine, image.affine)
        assert nib.aff2axcodes(mask.affine) == nib.aff2axcodes(image.affine), name
        for field in ["sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d", "pixdim"]:
            assert np.array_equal(mask.header[field], image.header[field]), (name, field)
        assert np.array_equal(mask.get_qform(), image.get_qform()), name
        assert mask.header.get_xyzt_units() == image.header.get_xyzt_units(), name
        assert mask.get_data_dtype() == np.uint8, name
        assert mask.header.get_slope_inter() == (None, None), name
        found, wanted = np.asanyarray(mask.dataobj), np.asanyarray(truth.dataobj)
        dice = 2 * (found * wanted == 1).sum() / ((found == 1).sum() + (wanted == 1).sum())
        off = np.linalg.norm(centre(mask) - centre(truth))
        assert dice > 0.8 and off < 3.0, f"{name}: Dice {dice:.3f}, {off:.2f} mm off"
        sure = nib.load(out / name.replace(".nii.gz", "_prob.nii.gz"))
        assert sure.shape == (*image.shape, 2) and sure.get_data_dtype() == np.float32, name
        assert np.array_equal(sure.affine, image.affine), name
        sums = sure.get_fdata().sum(-1)
        assert np.abs(sums - 1).max() < 1e-5, (name, sums.min(), sums.max())
        assert np.array_equal(sure.get_fdata().argmax(-1), found), name
        print(f"{name}: {nib.aff2axcodes(mask.affine)}, Dice {dice:.3f}, {off:.2f} mm off")


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "make":
        make(folder)
    else:
        judge(folder, Path(sys.argv[3]))
