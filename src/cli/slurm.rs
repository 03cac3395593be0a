//! What Slurm tells a worker: which node it is, and where its coordinator runs. `srun cpcr worker --run URL` needs no more.

use super::Failure;

/// The port on which a coordinator is looked for.
const PORT: u16 = 7070;

/// The coordinator's address and the node's number: as given, else by Slurm's variables.
///
/// # Errors
/// [`Failure`] (2) naming what is not known.
pub(super) fn place(
    coordinator: Option<String>,
    node: Option<u32>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<(String, u32), Failure> {
    let coordinator = coordinator
        .or_else(|| variable("SLURM_LAUNCH_NODE_IPADDR").map(|host| format!("{host}:{PORT}")))
        .ok_or_else(|| {
            Failure::usage("--coordinator HOST:PORT is wanted: where the coordinator is")
        })?;
    let node = match (node, variable("SLURM_PROCID")) {
        (Some(node), _) => node,
        (None, Some(text)) => text
            .parse()
            .map_err(|error| Failure::usage(format!("SLURM_PROCID is {text:?}: {error}")))?,
        (None, None) => {
            return Err(Failure::usage("--node is wanted: which node this is, 0 to N-1"));
        }
    };
    Ok((coordinator, node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_counts_more_than_what_slurm_says() {
        let slurm = |name: &str| match name {
            "SLURM_LAUNCH_NODE_IPADDR" => Some("10.1.2.3".to_owned()),
            "SLURM_PROCID" => Some("5".to_owned()),
            _ => None,
        };
        assert_eq!(place(None, None, slurm).unwrap(), ("10.1.2.3:7070".to_owned(), 5));
        let given = place(Some("a:1".to_owned()), Some(2), slurm).unwrap();
        assert_eq!(given, ("a:1".to_owned(), 2));
        let none = |_: &str| None;
        assert!(place(None, Some(2), none).unwrap_err().message.contains("--coordinator"));
        assert!(place(Some("a:1".to_owned()), None, none).unwrap_err().message.contains("--node"));
        let odd = |_: &str| Some("many".to_owned());
        let error = place(None, None, odd).unwrap_err();
        assert!(error.status == 2 && error.message.contains("many"));
    }
}
