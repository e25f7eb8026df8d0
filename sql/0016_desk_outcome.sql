-- What became of an action on a letter, where it is known that nothing did.

ALTER TABLE ackonce.desk_letter ADD COLUMN outcome text;
COMMENT ON COLUMN ackonce.desk_letter.outcome IS 'left: a second row of the same action, for a letter that could not be sent and stayed in the dead-letter queue. Null: the action was about to be carried out.';
