//! The secret that the processes of a run share: read, checked, never shown.

use std::path::PathBuf;

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::TrustError;

/// The environment variable with the token.
pub const TOKEN_VARIABLE: &str = "CPCR_JOIN_TOKEN";
/// The environment variable with the name of a file that holds it.
pub const TOKEN_FILE_VARIABLE: &str = "CPCR_JOIN_TOKEN_FILE";

/// Shorter ones can be guessed: whoever may connect sees a certificate that the token signed, and can try tokens at home.
const BYTES_MIN: usize = 32;
const BYTES_MAX: usize = 1024;
/// `changemechangemechangemechangeme` has seven; 32 random hexadecimal digits have fewer than this once in a thousand.
const DISTINCT_MIN: usize = 8;

/// A join token; its bytes are wiped when it goes.
pub struct JoinToken(Zeroizing<String>);

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinToken")
    }
}

impl JoinToken {
    /// A token, without the white space around it; `named` is where it comes from, for messages.
    ///
    /// # Errors
    /// [`TrustError::Token`] for one that could be guessed.
    pub fn new(text: &str, named: &str) -> Result<Self, TrustError> {
        let text = text.trim();
        let distinct = text.bytes().collect::<std::collections::BTreeSet<_>>().len();
        let why = if !(BYTES_MIN..=BYTES_MAX).contains(&text.len()) {
            format!("{BYTES_MIN} to {BYTES_MAX} characters are wanted, not {}", text.len())
        } else if distinct < DISTINCT_MIN {
            "it has too few different characters to be random".to_owned()
        } else if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            "letters, digits and signs of ASCII are wanted, without spaces".to_owned()
        } else {
            return Ok(Self(Zeroizing::new(text.to_owned())));
        };
        Err(TrustError::Token(format!("{named}: {why} (make one with `openssl rand -hex 32`)")))
    }

    /// The token of this process's environment, if it has one. An empty variable is none.
    ///
    /// # Errors
    /// [`TrustError::Token`] for one that cannot be used or read.
    pub fn from_environment() -> Result<Option<Self>, TrustError> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        match (set(TOKEN_VARIABLE), set(TOKEN_FILE_VARIABLE)) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(TrustError::Token(format!(
                "{TOKEN_VARIABLE} and {TOKEN_FILE_VARIABLE} are both set: unset one"
            ))),
            (Some(text), None) => {
                let text = Zeroizing::new(text.to_string_lossy().into_owned());
                Self::new(&text, TOKEN_VARIABLE).map(Some)
            }
            (None, Some(path)) => {
                let path = PathBuf::from(path);
                let named = format!("{TOKEN_FILE_VARIABLE} {}", path.display());
                let text = std::fs::read_to_string(&path)
                    .map_err(|error| TrustError::Token(format!("{named}: {error}")))?;
                Self::new(&Zeroizing::new(text), &named).map(Some)
            }
        }
    }

    /// A token of 256 random bits.
    ///
    /// # Errors
    /// [`TrustError::Token`] if the system has no randomness.
    pub fn random() -> Result<Self, TrustError> {
        let mut bytes = Zeroizing::new([0_u8; 32]);
        SystemRandom::new()
            .fill(bytes.as_mut())
            .map_err(|_| TrustError::Token("the system gives no randomness".to_owned()))?;
        Ok(Self(Zeroizing::new(hex::encode(bytes.as_ref()))))
    }

    /// The secret, for a child's environment and for what is derived from it; nowhere else.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}
