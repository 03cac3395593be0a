//! The largest connected part of each class in a slice's labels: how BCP cleans pseudo-labels.

/// Sets every pixel to background that does not belong to its class's largest part: 8 neighbours, the first
/// one found where two are equally large. `labels` is one slice, row by row, `width` wide.
pub(super) fn keep_largest(labels: &mut [u8], width: usize) {
    if width == 0 {
        return;
    }
    let mut part = vec![0usize; labels.len()];
    let mut sizes = vec![0usize];
    let mut stack = Vec::new();
    for start in 0..labels.len() {
        if labels[start] == 0 || part[start] != 0 {
            continue;
        }
        let id = sizes.len();
        sizes.push(0);
        part[start] = id;
        stack.push(start);
        while let Some(at) = stack.pop() {
            sizes[id] += 1;
            for next in neighbours(at, width, labels.len()) {
                if part[next] == 0 && labels[next] == labels[start] {
                    part[next] = id;
                    stack.push(next);
                }
            }
        }
    }
    // The largest part of each class.
    let mut largest = [0usize; 256];
    for (label, id) in labels.iter().zip(&part) {
        let best = &mut largest[usize::from(*label)];
        if sizes[*id] > sizes[*best] || (sizes[*id] == sizes[*best] && *id < *best) {
            *best = *id;
        }
    }
    for (label, id) in labels.iter_mut().zip(&part) {
        if largest[usize::from(*label)] != *id {
            *label = 0;
        }
    }
}

/// The up to eight pixels around `at`.
fn neighbours(at: usize, width: usize, len: usize) -> impl Iterator<Item = usize> {
    let (row, column) = (at / width, at % width);
    let rows = row.saturating_sub(1)..=(row + 1).min(len.div_ceil(width) - 1);
    rows.flat_map(move |r| {
        (column.saturating_sub(1)..=(column + 1).min(width - 1)).map(move |c| r * width + c)
    })
    .filter(move |&next| next != at && next < len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_part_of_each_class_stays_diagonals_join() {
        #[rustfmt::skip]
        let mut labels = [
            1, 0, 0, 2, 2,
            0, 1, 0, 0, 0,
            0, 0, 1, 0, 2,
            1, 0, 0, 0, 2,
            1, 0, 3, 0, 2,
        ];
        keep_largest(&mut labels, 5);
        #[rustfmt::skip]
        let kept = [
            1, 0, 0, 0, 0,
            0, 1, 0, 0, 0,
            0, 0, 1, 0, 2,
            0, 0, 0, 0, 2,
            0, 0, 3, 0, 2,
        ];
        assert_eq!(labels, kept);
    }

    #[test]
    fn of_two_equal_parts_the_first_stays() {
        let mut labels = [1, 0, 1, 0, 1, 1, 0, 1, 1];
        keep_largest(&mut labels, 9);
        assert_eq!(labels, [0, 0, 0, 0, 1, 1, 0, 0, 0]);
        keep_largest(&mut [], 0);
    }
}
