//! Connected components of label maps: what a prediction keeps of each class.
//!
//! Two voxels of a class hang together where they touch by a face, an edge or a corner, as
//! scikit-image's `label` has it by default. Not here: holes, and anything across classes.

/// Leaves the largest component of each foreground class and makes the others background.
/// `labels` is `[D, H, W]`; of components of equal size the first in memory stays.
pub fn keep_largest(labels: &mut [u8], shape: [usize; 3]) {
    let mut seen = vec![false; labels.len()];
    // The best component of each class so far.
    let mut kept: Vec<Vec<usize>> = vec![Vec::new(); 256];
    for start in 0..labels.len() {
        let class = labels[start];
        if class == 0 || seen[start] {
            continue;
        }
        let mut component = flood(labels, &mut seen, start, shape);
        let best = &mut kept[usize::from(class)];
        if component.len() > best.len() {
            std::mem::swap(best, &mut component);
        }
        for at in component {
            labels[at] = 0;
        }
    }
}

/// The voxels that hang together with `start`, marked as seen.
fn flood(labels: &[u8], seen: &mut [bool], start: usize, [d, h, w]: [usize; 3]) -> Vec<usize> {
    let around = |place: usize, sides: usize| place.saturating_sub(1)..(place + 2).min(sides);
    seen[start] = true;
    let mut found = vec![start];
    let mut next = 0;
    while let Some(&at) = found.get(next) {
        next += 1;
        for z in around(at / (h * w), d) {
            for y in around(at / w % h, h) {
                for x in around(at % w, w) {
                    let near = (z * h + y) * w + x;
                    if !seen[near] && labels[near] == labels[start] {
                        seen[near] = true;
                        found.push(near);
                    }
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_keeps_its_largest_piece() {
        #[rustfmt::skip]
        let mut labels = vec![
            1, 1, 0, 0, 2,
            0, 0, 1, 0, 0, // touches the two above by a corner
            2, 0, 0, 0, 1,

            0, 0, 0, 0, 0,
            0, 0, 0, 0, 1, // and this one the last of them from the next slice
            2, 2, 0, 0, 1,
        ];
        keep_largest(&mut labels, [2, 3, 5]);
        #[rustfmt::skip]
        let want = vec![
            1, 1, 0, 0, 0,
            0, 0, 1, 0, 0,
            2, 0, 0, 0, 0,

            0, 0, 0, 0, 0,
            0, 0, 0, 0, 0,
            2, 2, 0, 0, 0,
        ];
        assert_eq!(labels, want);
    }

    #[test]
    fn rows_do_not_wrap_around_and_nothing_is_no_trouble() {
        let mut labels = vec![0, 0, 1, 1, 0, 0];
        keep_largest(&mut labels, [1, 2, 3]);
        assert_eq!(labels, [0, 0, 1, 0, 0, 0], "neighbours in memory, not in space");
        keep_largest(&mut [], [0, 4, 4]);
    }
}
