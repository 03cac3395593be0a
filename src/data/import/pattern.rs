//! Names of files by pattern: `images/{case}_img.nii.gz`. One placeholder, and `*` for what varies
//! without meaning. Matching of text only: no folder is read here.

use crate::data::error::DataError;

/// The most `*` in a pattern: each one more multiplies the ways to try.
const STARS_MAX: usize = 3;

/// A pattern for paths or names with one kind of placeholder.
///
/// The placeholder and `*` stand for a run of characters without `/`, the longest that fits; the
/// placeholder's is not empty, and where it stands twice it means the same both times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    Star,
    Name,
}

impl Pattern {
    /// Reads `text`, in which `placeholder` (such as `{case}`) stands for what is asked for.
    ///
    /// # Errors
    /// [`DataError::Unusable`]: no placeholder, another one, too many `*`, or a way out of the
    /// folder.
    pub fn new(text: &str, placeholder: &str) -> Result<Self, DataError> {
        let bad = |why: String| Err(DataError::Unusable(format!("pattern `{text}`: {why}")));
        let path = text.strip_prefix("./").unwrap_or(text);
        if path.starts_with('/') || path.split('/').any(|part| part == "..") {
            return bad("it must lie within the folder".to_owned());
        }
        if path.matches('*').count() > STARS_MAX {
            return bad(format!("more than {STARS_MAX} `*`"));
        }
        let mut parts = Vec::new();
        for (at, around) in path.split(placeholder).enumerate() {
            if at > 0 {
                parts.push(Part::Name);
            }
            if around.contains(['{', '}']) {
                return bad(format!("the one placeholder is {placeholder}"));
            }
            for (at, literal) in around.split('*').enumerate() {
                if at > 0 {
                    parts.push(Part::Star);
                }
                if !literal.is_empty() {
                    parts.push(Part::Literal(literal.to_owned()));
                }
            }
        }
        if !parts.contains(&Part::Name) {
            return bad(format!("{placeholder} is missing"));
        }
        Ok(Self { text: text.to_owned(), parts })
    }

    /// As it was given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What stands in `path` where the placeholder is, if the whole of it fits.
    pub fn name_in<'a>(&self, path: &'a str) -> Option<&'a str> {
        find(&self.parts, path, None)
    }

    /// How many folders down its files lie.
    pub(super) fn folders(&self) -> usize {
        self.literals().map(|literal| literal.matches('/').count()).sum()
    }

    /// How much of it is fixed: of two patterns that fit, the one with more means the file.
    pub(super) fn fixed_bytes(&self) -> usize {
        self.literals().map(str::len).sum()
    }

    fn literals(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Literal(literal) => Some(literal.as_str()),
            Part::Star | Part::Name => None,
        })
    }
}

/// Fits `parts` to all of `text`; `name` is what the placeholder has meant so far.
fn find<'a>(parts: &[Part], text: &'a str, name: Option<&'a str>) -> Option<&'a str> {
    let Some((part, rest)) = parts.split_first() else {
        return name.filter(|_| text.is_empty());
    };
    let run = match (part, name) {
        (Part::Literal(literal), _) => return find(rest, text.strip_prefix(literal)?, name),
        (Part::Name, Some(name)) => return find(rest, text.strip_prefix(name)?, Some(name)),
        (Part::Name | Part::Star, _) => text.find('/').unwrap_or(text.len()),
    };
    let named = *part == Part::Name;
    let ends = (usize::from(named)..=run).rev().filter(|end| text.is_char_boundary(*end));
    ends.map(|end| text.split_at(end))
        .find_map(|(head, tail)| find(rest, tail, if named { Some(head) } else { name }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
        Pattern::new(pattern, "{case}").unwrap().name_in(path)
    }

    #[test]
    fn the_placeholder_is_found_and_the_rest_must_fit() {
        for (pattern, path, want) in [
            ("images/{case}_img.nii.gz", "images/p1_a_img.nii.gz", Some("p1_a")),
            ("./images/{case}.nii", "images/p1.nii", Some("p1")),
            ("images/{case}_img.nii.gz", "images/_img.nii.gz", None),
            ("images/{case}_img.nii.gz", "images/p1_img.nii", None),
            ("{case}.nii", "images/p1.nii", None),
            ("{case}/{case}_flair.nii", "a_1/a_1_flair.nii", Some("a_1")),
            ("{case}/{case}_flair.nii", "a_1/a_2_flair.nii", None),
            ("{case}/*.nii", "p1/anything.nii", Some("p1")),
            ("*/{case}_frame*.nii", "x/p1_frame_frame02.nii", Some("p1_frame")),
            ("*/{case}_4d.nii", "x/y/p1_4d.nii", None),
            ("é{case}ü.nii", "éßü.nii", Some("ß")),
            ("{case}", "", None),
        ] {
            assert_eq!(name(pattern, path), want, "{pattern} on {path}");
        }
    }

    #[test]
    fn a_pattern_that_means_nothing_is_refused() {
        for (pattern, words) in [
            ("images/*.nii", "missing"),
            ("{patient}/{case}.nii", "the one placeholder"),
            ("{case.nii", "the one placeholder"),
            ("/data/{case}.nii", "within the folder"),
            ("../{case}.nii", "within the folder"),
            ("*a*b*c*{case}", "more than"),
        ] {
            let error = Pattern::new(pattern, "{case}").unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(pattern), "{error}");
        }
    }
}
